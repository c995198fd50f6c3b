"""--mode=sample: images from a checkpoint, and how good they are."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffusion import compat, data, experiment, sampler
from diffusion.experiment import RunError
from diffusion.metrics import colour, frechet
from diffusion.report.grid import save_grid
from diffusion.runtime import mesh as meshes
from diffusion.runtime.files import versions, write_json
from diffusion.runtime.xla import compiled

LARGEST_FRECHET = 4096  # values an image; the covariance has the square of that


def make_sampler(exp, params, shape, *, batch_size, **how):
    """Compile the function (params, seed, start, stop) → images start … stop−1, float32, at most batch_size of them.

    params: arrays or their shapes and shardings; shape: of one image; how: keyword arguments of
    `sampler.sample`. One program serves all calls: a short batch is filled up, and every batch to a
    multiple of the devices. Image i depends on (seed, i) alone.
    """
    batch_size += -batch_size % exp.mesh.size

    def draw(params, seed, start):
        indices = jax.lax.with_sharding_constraint(start + jnp.arange(batch_size), meshes.split_batch(exp.mesh))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
        net = exp.network.net(meshes.whole(exp.mesh, params))
        return sampler.sample(keys, exp.schedule, net, shape=shape, **how)

    program = compiled(draw, params, 0, 0, out_shardings=meshes.replicated(exp.mesh))
    return lambda params, seed, start, stop: np.asarray(program(params, seed, start))[: stop - start]


def run(config, workdir):
    """Draw sample.num_images images and write samples/<name>/. Returns the process's exit status."""
    asked = config.sample
    config = experiment.resolve(config, workdir)
    exp = experiment.build(config)
    with experiment.naming('config.sample'):
        keys = ('num_steps', 'spacing', 'eta', 'variance', 'clip')
        how = compat.resolve(asked.compat, exp.schedule.T, **{key: asked[key] for key in keys})
        done = {key: how[key] for key in keys}
        how = {key: value for key, value in how.items() if key not in ('num_steps', 'spacing')}
    step, params = experiment.load_params(exp, config, workdir, asked.weights)
    samples = experiment.make_folder(workdir, 'samples')
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    batch_size = min(asked.batch_size, asked.num_images)
    experiment.keep_programs(config, workdir)
    started = time.perf_counter()
    with experiment.naming('config.sample'):
        draw = make_sampler(exp, params, shape, batch_size=batch_size, kind=config.model.kind, **how)
    ready = time.perf_counter()
    batches = []
    show = dict(desc='sample', unit='image', dynamic_ncols=True, disable=not meshes.is_first())
    with tqdm(total=asked.num_images, **show) as bar:
        for start in range(0, asked.num_images, batch_size):
            stop = min(start + batch_size, asked.num_images)
            batches.append(data.to_uint8(draw(params, asked.seed, start, stop)))
            bar.update(stop - start)
    images = np.concatenate(batches)
    finished = time.perf_counter()
    params_digest = experiment.digest(params)
    if not meshes.is_first():
        return 0

    name = (
        f'step{step}-{asked.weights}-eta{done["eta"]:.12g}-{done["num_steps"]}{done["spacing"]}-{done["variance"]}'
        f'{"" if done["clip"] else "-noclip"}{"-as-" * bool(asked.compat)}{asked.compat}-{config.model.dtype}'
        f'-n{asked.num_images}-seed{asked.seed}'
    )
    folder = os.path.join(samples, name)
    with experiment.writing(folder):
        save_grid(os.path.join(folder, 'grid.png'), images)
        np.savez(os.path.join(folder, 'samples.npz'), images)
    trained_on = (experiment.read_config(workdir) or {}).get('images')  # None of a run that was imported
    quality = distance_from_data(config, images, trained_on)
    drift, off = colour.drift(images, trained_on['channel_means']) if trained_on else (None, None)
    record = {
        'checkpoint_step': step,
        **asked.to_dict(),
        **done,
        **({'timesteps': how['timesteps'].tolist(), 'last_noise': how['last_noise']} if asked.compat else {}),
        'count': len(images),
        'model': config.model.to_dict(),
        'params_sha256': params_digest,
        'schedule': config.schedule.to_dict(),
        'quality': quality,
        'colour_drift': None if drift is None else drift.tolist(),
        'compile_seconds': round(ready - started, 3),
        'wall_seconds': round(finished - ready, 3),
        'device': f'{exp.mesh.size} × {jax.devices()[0].device_kind}',
        'versions': versions(),
    }
    with experiment.writing(folder):
        write_json(os.path.join(folder, 'record.json'), record)
    seconds = f'{finished - ready:.1f} s, and {ready - started:.1f} s to compile'
    print(f'{len(images)} images from step {step}, {asked.weights} weights, in {seconds}')
    if quality['value'] is None:
        print(f'{quality["metric"]}: none, because {quality["why"]}')
    else:
        print(f'{quality["metric"]} of {len(images)} images from {quality["reference"]}: {quality["value"]:.4f}')
    if off:
        print(f'warning: {off}')
    for file in ('grid.png', 'samples.npz', 'record.json'):
        print(os.path.join(folder, file))
    return 0


def distance_from_data(config, images, trained_on):
    """The Fréchet distance of samples, uint8 (N, H, W, C), from the training images; or why there is none.

    trained_on: `images` of the run's config.json, with which those of config.data are compared; None if it tells none.
    """
    quality = {'metric': 'Fréchet distance of raw pixels in [−1, 1] (this is no FID)'}
    if images[0].size > LARGEST_FRECHET:
        return quality | {'value': None, 'why': f'an image has {images[0].size} values, more than {LARGEST_FRECHET}'}
    if len(images) < 2:
        return quality | {'value': None, 'why': 'one image has no covariance'}
    try:
        real = experiment.load_images(config)
    except RunError as error:
        return quality | {'value': None, 'why': str(error)}
    if trained_on and real.record['sha256'] != trained_on['sha256']:
        return quality | {
            'value': None,
            'why': f'the {len(real)} images of config.data.source={config.data.source} are not the '
            f'{trained_on["count"]} that the run was trained on',
        }
    distance = frechet.distance(*(frechet.moments(data.to_float(batch)) for batch in (images, real[:])))
    return quality | {'reference': f'{config.data.source}, train split, {len(real)} images', 'value': distance}
