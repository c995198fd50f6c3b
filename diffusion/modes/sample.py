"""--mode=sample: images from a checkpoint, and how good they are."""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion import build, compat, data, sampler, workdir
from diffusion.build import Experiment
from diffusion.metrics import colour, frechet
from diffusion.report.grid import save_each, save_grid
from diffusion.runtime import hosts, mesh
from diffusion.runtime.keys import domain_key
from diffusion.util import RunError, naming, numerics, say, versions, write_json

LARGEST_FRECHET = 4096  # values per image; the covariance has the square of that
METRIC = 'Fréchet distance of raw pixels in [−1, 1] (not an FID)'


def run(config: ConfigDict, path: str) -> int:
    """Sample sample.num_images images and write samples/<name>/.

    Args:
        config: what is asked.
        path: the workdir.

    Returns:
        The exit status, 0.

    Raises:
        RunError: the config does not allow it, there is no checkpoint, or the folder cannot be written.
    """
    # Resolve.
    config = workdir.resolve(config, path)
    workdir.check_config(config, path)  # first: what is wrong with the rest may follow from another run's config
    asked = config.sample
    exp = build.build(config)
    with naming('config.sample'):
        keys = ('num_steps', 'spacing', 'eta', 'variance', 'clip')
        chain = compat.resolve(asked.compat, exp.schedule.T, **{key: asked[key] for key in keys})
    done = {key: chain.pop(key) if key in ('num_steps', 'spacing') else chain[key] for key in keys}
    step, params = workdir.load_params(exp.abstract_state(), config, path, asked.weights, asked.step)
    folder = os.path.join(workdir.output_folder(config, path, 'sample', 'samples'), name_of(config, step, done))
    workdir.use_compile_cache(config)

    # Compute.
    began = time.perf_counter()
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    batch_size = min(asked.batch_size, asked.num_images)
    with naming('config.sample'):
        how = dict(kind=config.model.kind, rule=asked.rule, **chain)
        draw = make_sampler(exp, params, shape, batch_size=batch_size, **how)
    compiled = time.perf_counter()
    images = draw_all(draw, params, asked, batch_size)
    finished = time.perf_counter()
    digest = workdir.digest(params)  # all hosts take part
    if not hosts.is_first():
        return 0

    # Record.
    with workdir.writing(folder, key='sample.folder'):
        save_grid(os.path.join(folder, 'grid.png'), images)
        np.savez(os.path.join(folder, 'samples.npz'), images)
        if asked.png:
            save_each(os.path.join(folder, 'png'), images)
    trained_on = (workdir.read_config(path) or {}).get('images')  # an imported run records none
    quality = distance_from_data(config, images, trained_on)
    drift, warning = colour.drift(images, trained_on['channel_means']) if trained_on else (None, None)
    record = {
        'checkpoint_step': step,
        **workdir.settings_for_record(asked),
        **done,
        **({'timesteps': chain['timesteps'].tolist(), 'last_noise': chain['last_noise']} if asked.compat else {}),
        'count': len(images),
        'model': config.model.to_dict(),
        'params_sha256': digest,
        'schedule': config.schedule.to_dict(),
        'quality': quality,
        'colour_drift': None if drift is None else drift.tolist(),
        'compile_seconds': round(compiled - began, 3),
        'wall_seconds': round(finished - compiled, 3),
        'device': f'{exp.mesh.size} × {jax.devices()[0].device_kind}',
        'implementation': exp.implementation.__name__.rpartition('.')[2],
        'numerics': numerics(),
        'versions': versions(),
    }
    with workdir.writing(folder, key='sample.folder'):
        write_json(os.path.join(folder, 'record.json'), record)

    # Report.
    seconds = f'{finished - compiled:.1f} s, and {compiled - began:.1f} s to compile'
    say(f'{len(images)} images from step {step}, {asked.weights} weights, in {seconds}')
    if quality['value'] is None:
        say(f'{quality["metric"]}: none, because {quality["why"]}')
    else:
        say(f'{quality["metric"]} of {len(images)} images from {quality["reference"]}: {quality["value"]:.4f}')
    if warning:
        say(f'warning: {warning}')
    for file in ('grid.png', 'samples.npz', *(['png'] if asked.png else []), 'record.json'):
        say(os.path.join(folder, file))
    return 0


def make_sampler(exp: Experiment, params: Any, shape: tuple[int, ...], *, batch_size: int, **how: Any) -> Callable:
    """Compile a function that draws any images of any seed.

    One program serves all calls: a short batch is filled up, and every batch to a multiple of the devices.

    Args:
        exp: schedule, network, mesh and implementation.
        params: parameters, or their shapes and shardings.
        shape: of one image, (H, W, C).
        batch_size: the largest number of images per call.
        how: keyword arguments of `sampler.sample`.

    Returns:
        The function (params, seed, start, stop) → images start … stop−1, (stop−start, H, W, C) float32. Image i
        depends on (seed, i) alone.
    """
    batch_size += -batch_size % exp.mesh.size

    def draw(params, seed, start):
        indices = jax.lax.with_sharding_constraint(start + jnp.arange(batch_size), mesh.split_batch(exp.mesh))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(domain_key(seed, 'sampling'), indices)
        net = exp.network.net(mesh.whole(exp.mesh, params))
        return sampler.sample(keys, exp.schedule, net, shape=shape, **how)

    program = exp.implementation.compile(draw, params, 0, 0, out_shardings=mesh.replicated(exp.mesh))
    return lambda params, seed, start, stop: np.asarray(program(params, seed, start))[: stop - start]


def draw_all(draw: Callable, params: Any, asked: ConfigDict, batch_size: int) -> np.ndarray:
    """Draw all images that config.sample asks for: (num_images, H, W, C) uint8."""
    batches = []
    show = dict(desc='sample', unit='image', dynamic_ncols=True, disable=not hosts.is_first())
    with tqdm(total=asked.num_images, **show) as bar:
        for start in range(0, asked.num_images, batch_size):
            stop = min(start + batch_size, asked.num_images)
            batches.append(data.to_uint8(draw(params, asked.seed, start, stop)))
            bar.update(stop - start)
    return np.concatenate(batches)


def name_of(config: ConfigDict, step: int, done: dict[str, Any]) -> str:
    """Return the name of the folder of the samples: everything that the images depend on."""
    asked = config.sample
    return (
        f'step{step}-{asked.weights}-eta{done["eta"]:.12g}-{done["num_steps"]}{done["spacing"]}-{done["variance"]}'
        f'{"" if done["clip"] else "-noclip"}{"" if asked.rule == "kernel" else f"-{asked.rule}"}'
        f'{f"-as-{asked.compat}" if asked.compat else ""}-{config.model.dtype}-n{asked.num_images}-seed{asked.seed}'
    )


def distance_from_data(config: ConfigDict, images: np.ndarray, trained_on: dict[str, Any] | None) -> dict[str, Any]:
    """Return the Fréchet distance between samples and the training images, or why there is none.

    Args:
        config: config.data says where the training images are.
        images: (N, H, W, C) uint8, the samples.
        trained_on: what config.json records of the images that the run was trained on, or None.

    Returns:
        {'metric', 'value', and 'reference' or 'why'}; the value is None if there is no distance.
    """
    none = {'metric': METRIC, 'value': None}
    if images[0].size > LARGEST_FRECHET:
        return none | {'why': f'an image has {images[0].size} values, more than {LARGEST_FRECHET}'}
    if len(images) < 2:
        return none | {'why': 'one image has no covariance'}
    try:
        real = build.load_images(config)
    except RunError as error:
        return none | {'why': str(error)}
    if trained_on and real.record['sha256'] != trained_on['sha256']:
        why = (
            f'the {len(real)} images of config.data.source={config.data.source} are not the {trained_on["count"]} '
            'that the run was trained on'
        )
        return none | {'why': why}
    return {
        'metric': METRIC,
        'value': frechet.distance(moments(images), moments(real)),
        'reference': f'{config.data.source}, {config.data.split} split, {len(real)} images',
    }


def moments(images: data.Images | np.ndarray) -> frechet.Moments:
    """Return the mean and the covariance of uint8 images in [−1, 1], which are read 1,000 at a time."""
    return frechet.moments(np.asarray(data.to_float(images[i : i + 1000])) for i in range(0, len(images), 1000))
