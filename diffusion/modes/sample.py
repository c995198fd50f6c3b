"""--mode=sample: images from a checkpoint, and their metrics."""

import glob
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict

from diffusion import build, compat, data, sampler, workdir
from diffusion.build import Experiment
from diffusion.conditions import Conditions, condition, open_conditions, require_conditions
from diffusion.metrics import colour
from diffusion.modes import evaluate
from diffusion.networks import Program
from diffusion.report.grid import save_each, save_grid
from diffusion.runtime import hosts, memory, mesh
from diffusion.runtime.compilation import compiling
from diffusion.runtime.interrupt import EXIT_STATUS, Interrupt
from diffusion.runtime.keys import domain_key
from diffusion.schedule import start_warning
from diffusion.util import (
    RunError,
    json_sha256,
    lock,
    naming,
    no_link,
    numerics,
    progress,
    replacing,
    say,
    stage,
    versions,
)

MEMORY = 'lower config.sample.batch_size'  # if there is too little


def run(config: ConfigDict, path: str) -> int:
    """Sample sample.num_images images and write samples/<name>/.

    Args:
        config: the config of the command.
        path: the workdir.

    Returns:
        0 if everything is drawn, EXIT_STATUS if a signal stopped it (the images so far are kept).

    Raises:
        RunError: the config does not allow it, there is no checkpoint, or the folder cannot be written.
    """
    # Resolve.
    config = workdir.resolve(config, path)
    workdir.check_config(config, path)  # first: what is wrong with the rest may follow from another run's config
    asked = config.sample
    exp = build.build(config)
    done, chain = resolve_chain(asked, exp)
    first_level = int(np.asarray(chain['timesteps']).flat[0])  # whose noise x_T is
    if first_level < exp.schedule.T and (why := start_warning(exp.schedule, first_level)):
        say(f"warning: config.sample: {why}; spacing='trailing' starts at T")
    require_conditions(config, path)
    say(f'reading a checkpoint of {path}')
    step, params = workdir.load_params(exp.abstract_state(), config, path, asked.weights, asked.step)
    conditions = open_conditions(config, exp)
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    plan = evaluate.prepare(config, shape)
    folder = os.path.join(
        workdir.output_folder(config, path, 'sample', 'samples'), name_of(config, step, done, conditions)
    )
    workdir.use_compile_cache(config)
    params_sha256 = workdir.digest(params)  # all hosts take part

    # Compute.
    began = time.perf_counter()
    batch_size = min(asked.batch_size, asked.num_images)
    with naming('config.sample'):
        how = dict(kind=config.model.kind, rule=asked.rule, **chain)
        params = conditions.params(params)
        draw = make_sampler(exp, params, shape, batch_size=batch_size, net_of=conditions.net_of, **how)
    compiled = time.perf_counter()
    with workdir.writing(folder, key='sample.folder'), Interrupt('batch') as interrupt:
        drawn = Drawn(folder, shape, settings_sha256(config, params_sha256, done, chain, conditions.settings))
        count = draw_all(draw, params, asked, batch_size, drawn, exp.mesh, interrupt)
        if count < asked.num_images or (interrupt and jax.process_count() == 1):
            reason = interrupt or 'a signal to another host'
            say(f'{reason}: {count} of {asked.num_images} images are drawn and kept; the same command resumes')
            return EXIT_STATUS
    finished = time.perf_counter()
    images, labels = drawn.images() if hosts.is_first() else None, conditions.labels_of(count)
    if images is not None:  # before they are measured, which takes a while
        with workdir.writing(folder, key='sample.folder'):
            save_grid(os.path.join(folder, 'grid.png'), images, classes=len(conditions.labels))
            save_npz(os.path.join(folder, 'samples.npz'), images, *labels)
            if asked.png:
                save_each(os.path.join(folder, 'png'), images)
        workdir.wrote(folder, 'grid.png', 'samples.npz', *(['png'] if asked.png else []))
    trained_on = (workdir.read_config(path) or {}).get('images')  # an imported run records none
    with stage('measuring the samples'):
        found = evaluate.measure(config, plan, images, count, exp.mesh, trained_on, folder, *labels)
    if images is None:
        return 0

    # Record.
    drift, warning = colour.drift(images, trained_on['channel_means']) if trained_on else (None, None)
    record = {
        'checkpoint_step': step,
        **workdir.settings_for_record(asked),
        **({'guide': conditions.guide.record} if conditions.guide else {}),
        **done,
        **({'timesteps': chain['timesteps'].tolist(), 'last_noise': chain['last_noise']} if asked.compat else {}),
        'count': count,
        'model': config.model.to_dict(),
        'params_sha256': params_sha256,
        'schedule': config.schedule.to_dict() | {'signal_at_T': float(exp.schedule.signal(exp.schedule.T))},
        'first_level': first_level,
        'signal_at_start': float(exp.schedule.signal(first_level)),  # √ᾱ there
        'quantization': 'rounded to 8 bits',
        'colour_drift': None if drift is None else drift.tolist(),
        'compile_seconds': round(compiled - began, 3),
        'wall_seconds': round(finished - compiled, 3),
        'device': f'{exp.mesh.size} × {jax.devices()[0].device_kind}',
        'implementation': exp.implementation.__name__.rpartition('.')[2],
        'numerics': numerics(),
        'versions': versions(),
    }
    if names := evaluate.lost(folder, found):
        say(
            f'record.json replaces one that also has {", ".join(names)}; --mode=evaluate measures samples.npz again '
            'and keeps a record of its own'
        )
    with workdir.writing(folder, key='sample.folder'):
        evaluate.write_found(folder, record, found, {})
        drawn.remove()
    workdir.wrote(folder, 'record.json')

    # Report.
    seconds = f'{finished - compiled:.1f} s, and {compiled - began:.1f} s to compile'
    say(f'{count} images from step {step}, {asked.weights} weights, in {seconds}')
    evaluate.tell(found)
    if warning and asked.labels == 'all':  # some classes may have other colours than all of them
        say(f'warning: {warning}')
    return 0


def resolve_chain(asked: ConfigDict, exp: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what config.sample says of the chain, as it will be done, and its part of `sampler.sample`'s arguments."""
    keys = ('num_steps', 'spacing', 'eta', 'variance', 'clip')
    with naming('config.sample'):
        exp.network.require_variance(asked.variance)
        learned = exp.network.learns_variance
        chain = compat.resolve(asked.compat, exp.schedule.T, **{key: asked[key] for key in keys}, learned=learned)
    done = {key: chain.pop(key) if key in ('num_steps', 'spacing') else chain[key] for key in keys}
    return done, chain


def settings_sha256(
    config: ConfigDict, params_sha256: str, done: dict[str, Any], chain: dict[str, Any], conditions: dict[str, Any]
) -> str:
    """Return a digest of everything that determines the pixels of image i, for every i."""
    settings = {
        'params': params_sha256,
        'model': config.model.to_dict(),
        'schedule': config.schedule.to_dict(),
        'sample': {key: config.sample[key] for key in ('seed', 'rule', 'compat')} | done,
        'conditions': conditions,
        'timesteps': np.asarray(chain['timesteps']).tolist(),
        'device': jax.devices()[0].device_kind,
        'numerics': numerics(),
        'versions': versions(),
    }
    return json_sha256(settings)


class Drawn:
    """Images that are drawn one batch after another, on disk: one file of raw pixels. Only the first host has it.

    An interrupted run leaves whole images and perhaps a part of one, which is drawn again.

    Args:
        folder: of the samples.
        shape: of an image, (H, W, C).
        settings: a digest of what the pixels depend on; images of other settings are removed.
    """

    def __init__(self, folder: str, shape: tuple[int, ...], settings: str):
        self._shape, self._path = shape, os.path.join(folder, f'drawn-{settings[:16]}.bin')
        if hosts.is_first():
            os.makedirs(folder, exist_ok=True)
            for other in set(glob.glob(os.path.join(glob.escape(folder), 'drawn-*.bin'))) - {self._path}:
                os.remove(other)
            with open(self._path, 'ab', opener=no_link) as file:
                file.truncate(self.count() * math.prod(shape))

    def count(self) -> int:
        """Return the number of whole images."""
        return os.path.getsize(self._path) // math.prod(self._shape)

    def append(self, start: int, images: UInt8[np.ndarray, 'n H W C']) -> None:
        """Add the images from number `start` on; when it returns, they are on disk.

        Raises:
            RunError: another process adds some, or has added some meanwhile.
        """
        with open(self._path, 'ab', opener=no_link) as file:
            try:
                lock(file)
                alone = self.count() == start
            except BlockingIOError:
                alone = False
            if not alone:
                raise RunError(f'another process is drawing the images of {self._path}, too: let it finish')
            file.write(np.ascontiguousarray(images).data)
            file.flush()
            os.fsync(file.fileno())

    def images(self) -> UInt8[np.ndarray, 'N H W C']:
        """Return all of them, without reading them."""
        return np.memmap(self._path, np.uint8, 'r', shape=(self.count(), *self._shape))

    def remove(self) -> None:
        """Remove the file."""
        os.remove(self._path)


def draw_all(
    draw: Callable, params: Any, asked: ConfigDict, batch_size: int, drawn: Drawn, devices: Mesh, interrupt: Interrupt
) -> int:
    """Draw the images of config.sample that are missing; return how many there are now."""
    stopped = hosts.AnyHost(devices)
    done = int(hosts.from_first(np.array(drawn.count() if hosts.is_first() else 0)))
    bar = progress(total=asked.num_images, initial=done, doing='sample', unit='image', hidden=not hosts.is_first())
    with bar:
        while done < asked.num_images and not stopped(interrupt):
            stop = min(done + batch_size, asked.num_images)
            images = data.to_uint8(draw(params, asked.seed, done, stop))
            if hosts.is_first():
                drawn.append(done, images)
            bar.update(stop - done)
            done = stop
    return done


def save_npz(path: str, images: UInt8[np.ndarray, 'N H W C'], *labels: np.ndarray) -> None:
    """Write images as arr_0, and labels as arr_1, of an .npz file, atomically and without holding images in memory."""
    with replacing(path) as file:
        np.savez(file, images, *labels)


def make_sampler(
    exp: Experiment,
    params: Any,
    shape: tuple[int, ...],
    *,
    batch_size: int,
    net_of: Callable | None = None,
    **how: Any,
) -> Callable:
    """Compile a function that draws any images of any seed.

    Args:
        exp: schedule, network, mesh and implementation.
        params: parameters, or their shapes and shardings.
        shape: of one image, (H, W, C).
        batch_size: the largest number of images per call.
        net_of: see `compile_draw`.
        how: keyword arguments of `sampler.sample`.

    Returns:
        The function (params, seed, start, stop) → images start … stop−1, (stop−start, H, W, C) float32. Image i
        depends on (seed, i) alone.
    """
    return make_draw(exp, params, follow_chain(exp, shape, **how), batch_size=batch_size, net_of=net_of)


def follow_chain(exp: Experiment, shape: tuple[int, ...], **how: Any) -> Callable:
    """Return (keys, net) → images by `sampler.sample`, whose other keyword arguments are `how`."""

    def sample(keys, net):
        net = exp.network.for_variance(net, how.get('variance', 'small'))
        return sampler.sample(keys, exp.schedule, net, shape=shape, **how)

    return sample


def make_draw(
    exp: Experiment, params: Any, sample: Callable, *more: Any, batch_size: int, net_of: Callable | None = None
) -> Callable:
    """Compile a function that draws any images of any seed.

    One program serves all calls: a short batch is filled up, and every batch to a multiple of the devices.

    Args:
        exp: as in `compile_draw`, and so are the others.
        params: parameters, or their shapes and shardings.
        sample: (keys (N,), net, *more) → images.
        more: what each call passes on, or arrays of the same shapes and types.
        batch_size: the largest number of images per call.
        net_of: see `compile_draw`.

    Returns:
        The function (params, seed, start, stop, *more) → images start … stop−1, (stop−start, H, W, C) float32.
    """
    with compiling('the sampler'):
        program = compile_draw(exp, params, sample, *more, batch_size=batch_size, net_of=net_of)
    memory.require(memory.of_program(program.compiled), f'a batch of {batch_size} samples, as XLA plans it,', MEMORY)
    return lambda params, seed, start, stop, *more: mesh.fetch(program(params, seed, start, *more))[: stop - start]


def compile_draw(
    exp: Experiment, params: Any, sample: Callable, *more: Any, batch_size: int, net_of: Callable | None = None
) -> Program:
    """Compile (params, seed, first, *more) → images first, first + 1, …, at least `batch_size`.

    Args:
        exp: network, mesh and implementation.
        params: parameters, or their shapes and shardings.
        sample: (keys (N,), net, *more) → images (N, H, W, C) float32; image i depends on keys[i] and `more` alone.
        more: pytrees of arrays, or of their shapes.
        batch_size: the largest number of images per call.
        net_of: (params, indices of the images (B,)) → net, see `condition`; None is the network without classes.

    Returns:
        The program.
    """
    batch_size += -batch_size % exp.mesh.size
    make_net = net_of or condition(exp)

    def draw(params, seed, first, *more):
        indices = jax.lax.with_sharding_constraint(first + jnp.arange(batch_size), mesh.split_batch(exp.mesh))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(domain_key(seed, 'sampling'), indices)
        net = make_net(exp.implementation.unpack(mesh.whole(exp.mesh, params)), indices)
        return sample(keys, net, *more)

    return exp.implementation.compile(draw, params, 0, 0, *more, out_shardings=mesh.replicated(exp.mesh))


def name_of(config: ConfigDict, step: int, done: dict[str, Any], conditions: Conditions) -> str:
    """Return the name of the folder of the samples: everything that the images depend on."""
    asked = config.sample
    conditioned = f'-guidance{asked.guidance:.12g}' if asked.guidance != 1 else ''
    if asked.labels != 'all' or (conditioned and (asked.guidance_interval or asked.guide)):
        conditioned += f'-{hashlib.sha256(json.dumps(conditions.settings).encode()).hexdigest()[:8]}'
    return (
        f'step{step}-{asked.weights}-eta{done["eta"]:.12g}-{done["num_steps"]}{done["spacing"]}-{done["variance"]}'
        f'{"" if done["clip"] else "-noclip"}{"" if asked.rule == "kernel" else f"-{asked.rule}"}'
        f'{f"-as-{asked.compat}" if asked.compat else ""}{conditioned}'
        f'-{config.model.dtype}-n{asked.num_images}-seed{asked.seed}'
    )
