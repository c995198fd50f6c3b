"""--mode=train: the training step, and the loop around it."""

import contextlib
import functools
import itertools
import math
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from diffusion import data, experiment, generate
from diffusion.experiment import RunError, TrainState
from diffusion.loss import draw, loss_at
from diffusion.metrics import colour
from diffusion.report.grid import save_grid
from diffusion.runtime import mesh as meshes
from diffusion.runtime.errors import first_line
from diffusion.runtime.interrupt import EXIT_STATUS, Interrupt
from diffusion.runtime.writer import Writer
from diffusion.runtime.xla import compiled, operations
from diffusion.schedule import timesteps


def show(key, images, *, flip):
    """What the network is shown of images, uint8 (B, H, W, C): floats in [−1, 1], with `flip` half of them mirrored."""
    x0 = data.to_float(images)
    if flip:
        mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
        x0 = jnp.where(mirrored, x0[:, :, ::-1], x0)
    return x0


def train_step(state, images, indices, *, exp, seed, kind, weighting, ema_decay, flip, accumulate=1):
    """One step of Adam on the batch images[indices], and the EMA of the parameters it gives.

    state: TrainState; images: (N, H, W, C) uint8; indices: (B,) int32, or None where the images are the
    batch. accumulate: into how many parts each device cuts its share, of which the gradients are averaged; their
    draws are those of the whole batch, but for the dropout. All randomness follows from (seed, state.step).

    Returns the next TrainState and {'loss', 'grad_norm', 'param_norm', 'learning_rate'}: the gradient's norm
    before clipping, the parameters' after the step. Where one of these is not finite, the state stays as it
    was, but for the step.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    flip_key, loss_key, dropout_key = jax.random.split(key, 3)
    x0 = show(flip_key, images if indices is None else images[indices], flip=flip)

    t, eps = draw(loss_key, exp.schedule.T, x0.shape, weighting=weighting)

    def mean_loss(params, dropout_key, x0, t, eps):
        net = exp.network.net(params, dropout_key=dropout_key)
        return loss_at(exp.schedule, net, x0, t, eps, kind=kind, weighting=weighting).mean()

    gradient_of, whole = jax.value_and_grad(mean_loss), meshes.whole(exp.mesh, state.params)
    if accumulate == 1:
        value, gradient = gradient_of(whole, dropout_key, x0, t, eps)
    else:
        batch = x0, t, eps
        value, gradient = meshes.mean_over_parts(exp.mesh, gradient_of, whole, dropout_key, batch, accumulate)
    gradient = meshes.like_state(exp.mesh, gradient)
    updates, opt_state = exp.optimizer.update(gradient, state.opt_state, state.params)
    rate = exp.learning_rate(state.step)
    params = optax.apply_updates(state.params, jax.tree.map(lambda leaf: rate * leaf, updates))
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    metrics = {
        'loss': value,
        'grad_norm': optax.global_norm(gradient),
        'param_norm': optax.global_norm(params),
        'learning_rate': rate,
    }
    good = jnp.isfinite(jnp.array([value, metrics['grad_norm'], metrics['param_norm']])).all()
    new, old = (params, ema, opt_state), (state.params, state.ema, state.opt_state)
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
    return TrainState(state.step + 1, *kept), metrics


def run(config, workdir):
    """Train, or go on from the newest checkpoint, to train.num_steps. Returns the process's exit status."""
    config = experiment.resolve(config, workdir)
    exp = experiment.build(config)
    train = config.train
    part = exp.mesh.size * train.accumulate
    if train.batch_size % part:
        raise RunError(
            f'config.train.batch_size is {train.batch_size}, which {exp.mesh.size} devices cannot share evenly in '
            f'train.accumulate={train.accumulate} parts: ask for a multiple of {part}'
        )
    experiment.check_config(config, workdir)  # before the images are decoded
    images = experiment.load_same_images(config)
    if train.batch_size > len(images):
        raise RunError(
            f'config.train.batch_size is {train.batch_size}, but there are only {len(images)} images: '
            'ask for a smaller batch, or find more pictures'
        )
    with experiment.hold(workdir) as held, Interrupt() as interrupt:
        experiment.check_config(config, workdir, images)  # nobody changes it from here on
        experiment.keep_programs(config, workdir)
        with experiment.open_checkpoints(config, workdir, writing=True) as checkpoints:
            return _train(config, workdir, exp, images, checkpoints, held, interrupt)


def _train(config, workdir, exp, images, checkpoints, held, interrupt):
    num_steps, where = config.train.num_steps, f'checkpoints in {workdir}/checkpoints'
    state = restore(exp, checkpoints, seed=config.seed)
    step = int(state.step)
    if step >= num_steps:
        print(f'complete: {step} steps of train.num_steps={num_steps}; {where}')
        return 0
    experiment.remember_config(config, workdir, images, step)
    batches = feed(config, exp, images, step)
    first = next(batches)
    print(f'{len(images)} images of {config.data.source}; step {step} of {num_steps}; {where}; compiling …', flush=True)
    started = time.perf_counter()
    compiled_step = compile_step(config, exp, state, *first)
    flops = operations(compiled_step, config.train.accumulate)
    print(f'{describe(exp, state, flops)}; compiled in {time.perf_counter() - started:.1f} s', flush=True)
    loop = Loop(config, workdir, exp, images, checkpoints, held, interrupt, flops)
    step = loop.run(compiled_step, state, itertools.chain([first], batches))
    if loop.bad:
        print(f'{loop.bad} steps were skipped because their numbers were not finite')
    if step < num_steps:
        saved = f'after step {step}, which is saved' if step else 'before the first step'
        print(f'{interrupt or "another host was asked to"}: stopped {saved}; the same command goes on')
        return EXIT_STATUS
    print(f'complete: {step} steps; {where}')
    return 0


def describe(exp, state, flops):
    """One line: hosts, devices, mesh, parameters, bytes of state on a device, operations of a step on a device."""
    mesh, device = exp.mesh, exp.mesh.devices.flat[0]
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    hosts = f'{jax.process_count()} hosts, ' if jax.process_count() > 1 else ''
    return (
        f'{hosts}{mesh.size} × {device.device_kind} as data {mesh.shape["data"]} × fsdp {mesh.shape["fsdp"]}; '
        f'{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters; {held / 1e6:.1f} MB of state a '
        f'device; {flops / 1e9:.3g} GFLOP a step and device'
    )


def restore(exp, checkpoints, *, seed):
    """The TrainState of the newest checkpoint, or a new one where there is none yet."""
    abstract = exp.abstract_state()
    with experiment.intact():
        found = checkpoints.restore_newest(print, **_saved_of(abstract))
    if found is None:
        return jax.jit(exp.init, out_shardings=_shardings(abstract))(jax.random.key(seed))
    step, trees = found
    checkpoints.put_aside(step)
    return TrainState(meshes.put_whole(np.int32(step), abstract.step.sharding), *trees)


def _saved_of(state):
    """The trees of a checkpoint."""
    return {'params': state.params, 'ema': state.ema, 'opt_state': state.opt_state}


def compile_step(config, exp, state, images, indices):
    """Compile `train_step` with all that does not change from step to step; the state's buffers are reused."""
    step_fn = functools.partial(
        train_step,
        exp=exp,
        seed=config.seed,
        kind=config.model.kind,
        weighting=config.train.loss,
        ema_decay=config.train.ema_decay,
        flip=config.data.flip,
        accumulate=config.train.accumulate,
    )
    out_shardings = _shardings(state), meshes.replicated(exp.mesh)
    parts = exp.mesh.size * config.train.accumulate
    largest = config.train.batch_size // parts * config.data.image_size**2 * config.model.channels
    args = state, images, indices
    with experiment.naming('config.train'):
        return compiled(step_fn, *args, out_shardings=out_shardings, largest_kept=largest, donate=(0,))


def feed(config, exp, images, start):
    """What `train_step` takes of each step from `start` on: (images, indices) on the devices.

    data.placement 'device' keeps all images there, and only their numbers are sent; 'host' sends batches,
    gathered ahead of the step that needs them; 'auto' keeps those that fit. RunError: 'device' without a cache.
    """
    placement, stop = config.data.placement, config.train.num_steps
    on_device = config.data.cache and meshes.fits(exp.mesh, images.images.nbytes)
    if placement == 'device' and not config.data.cache:
        raise RunError('config.data.placement is device, but with config.data.cache=False images are decoded anew')
    order = data.Order(
        len(images), config.train.batch_size, config.seed, host=jax.process_index(), hosts=jax.process_count()
    )
    split = meshes.split_batch(exp.mesh)
    if placement == 'device' or (placement == 'auto' and on_device):
        whole = meshes.put(images.images, meshes.replicated(exp.mesh))
        return ((whole, meshes.put(order[step], split)) for step in range(start, stop))
    return ((meshes.put(batch, split), None) for batch in data.prefetch(images, order, start, stop))


def _shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


class Loop:
    """The steps of one process, and what happens between them: logs, checkpoints, sample grids."""

    def __init__(self, config, workdir, exp, images, checkpoints, held, interrupt, flops):
        self._config, self._train, self._workdir, self._exp = config, config.train, workdir, exp
        self._images, self._data_means = images, np.asarray(images.record['channel_means'])
        self._record = {'images': {key: images.record[key] for key in ('count', 'sha256', 'fingerprint')}}
        self._checkpoints, self._held, self._interrupt = checkpoints, held, interrupt
        self._flops, self._peak = flops, meshes.peak_flops(exp.mesh.devices.flat[0])
        self._draw = None
        self._also, self._was_right = {}, False
        self.bad = self._bad_in_a_row = 0

    def run(self, compiled_step, state, batches):
        """Steps until train.num_steps or an interrupt, the last of which is saved. Returns the steps done."""
        train, step = self._train, int(state.step)
        asked = meshes.Agreement(self._exp.mesh)
        self._saved = self._retry = step
        self._checkpoints.reserve(**_saved_of(state))
        self._rate = _Rate()
        alone = jax.process_count() == 1
        with (
            contextlib.ExitStack() as self._stack,
            tqdm(
                total=train.num_steps,
                initial=step,
                desc='train',
                unit='step',
                dynamic_ncols=True,
                disable=not meshes.is_first(),
            ) as self._bar,
        ):
            self._open_logs(step)
            pending, batch = None, next(batches)
            while step < train.num_steps and not asked(self._interrupt):
                state, metrics = compiled_step(state, *batch)
                step += 1
                batch = next(batches, None)  # on its way to the devices while they work
                if pending:
                    self._settle(*pending)
                pending = step, metrics
                saving = step % train.checkpoint_every == 0 or step == self._retry
                saving |= alone and (self._checkpoints.failed or (step % train.log_every == 0 and self._held.lost()))
                sampling = train.sample_every and step % train.sample_every == 0
                if saving or sampling:
                    self._settle(*pending)
                    pending = None
                if saving:
                    self._save(step, state)
                if sampling:
                    self._sample(step, state)
                if saving or sampling:
                    self._rate.restart()
            if pending:
                self._settle(*pending)
            if step > self._saved:
                self._save(step, state)
            self._finish(step)
        return step

    def _settle(self, step, metrics):
        """Look at a step's numbers, once the next step is under way: the devices do not wait for the host."""
        train = self._train
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        good = all(math.isfinite(value) for value in values.values())
        self._bad_in_a_row = 0 if good else self._bad_in_a_row + 1
        self.bad += not good
        self._rate.count()
        self._bar.update()
        if not good or step % train.log_every == 0 or step == train.num_steps:
            rate = self._rate.take()
            values['images_per_second'] = rate * train.batch_size
            shown = {'loss': f'{values["loss"]:.4f}', 'images/s': f'{values["images_per_second"]:.0f}'}
            if self._peak and not math.isnan(self._flops):
                values['utilisation'] = rate * self._flops / self._peak
                shown['use'] = f'{values["utilisation"]:.0%}'
            self._bar.set_postfix(shown)
            if self._writer:
                self._writer.scalars(step, **values, **self._also, skipped=self.bad)
        if self._bad_in_a_row >= train.max_bad_steps:
            any_saved = self._saved or self._checkpoints.steps()  # that of an import is of step 0
            kept = f'the checkpoint of step {self._saved} is good' if any_saved else 'there is no checkpoint yet'
            found = ', '.join(f'{name} {values[name]}' for name in ('loss', 'grad_norm', 'param_norm'))
            raise RunError(
                f'{found} at step {step}, the last of {self._bad_in_a_row} in a row that were not finite and changed '
                f'nothing; {kept}. A lower train.learning_rate or train.grad_clip, or a longer train.warmup_steps, '
                'may help.'
            )

    def _open_logs(self, step):
        self._writer = None
        if meshes.is_first():
            self._writer = self._stack.enter_context(Writer(os.path.join(self._workdir, 'logs'), step=step, warn=_warn))

    def _save(self, step, state):
        """Save in the background. What fails is told, and tried again after a while, which is no reason to stop."""
        try:
            if self._held and self._held.lost():
                self._begin_anew(step)
            self._checkpoints.save(step, self._record, **_saved_of(state))
            self._saved = step
        except (OSError, ValueError) as error:
            self._saved = max(self._checkpoints.steps(), default=0)
            self._retry = step + self._train.log_every
            _warn(f'the checkpoint of step {step} could not be saved ({first_line(error)}); trying again')

    def _begin_anew(self, step):
        """The workdir was removed or moved under the run: make it once more, with all that a run consists of."""
        try:
            self._held.take()
        except BlockingIOError as error:
            raise RunError(f'{self._workdir} was removed or moved under this run, and now {error}') from error
        experiment.remember_config(self._config, self._workdir, self._images, step)
        self._open_logs(step)
        _warn(f'{self._workdir} was removed or moved under the run: it is made anew, and goes on from step {step}')

    def _finish(self, step):
        """Wait for the last save. Raises RunError where it fails."""
        try:
            self._checkpoints.wait()
        except (OSError, ValueError) as error:
            self._saved = max(self._checkpoints.steps(), default=0)
            _warn(first_line(error))
        if self._saved < step:
            raise RunError(
                f'step {step} could not be saved in {self._workdir}/checkpoints; the newest checkpoint there is of '
                f'step {self._saved}, from which the same command goes on'
            )

    def _sample(self, step, state):
        """A sheet of images, by which one watches a network learn; and whether their colours are the data's."""
        self._draw = self._draw or progress_sampler(self._config, self._exp, state.ema)
        images = self._draw(state.ema)
        if not self._writer:
            return
        path = os.path.join(self._workdir, 'samples', 'progress', f'{step:08d}.png')
        try:
            self._writer.image(step, 'samples', save_grid(path, images))
        except OSError as error:
            _warn(f'{path} could not be written ({error}); going on without')
        drift, off = colour.drift(images, self._data_means)
        self._also = {'colour_drift': float(np.abs(drift).max())}
        if off and (self._was_right or 2 * step >= self._train.num_steps):  # at first they are noise
            _warn(f'{off} at step {step}')
        self._was_right |= not off


def _warn(message):
    tqdm.write(f'warning: {message}', file=sys.stderr)


def progress_sampler(config, exp, params):
    """The function params → 64 images, uint8, by which one watches a network learn: DDIM, 20 steps."""
    draw = generate.make_sampler(
        exp,
        params,
        (config.data.image_size, config.data.image_size, config.data.channels),
        batch_size=64,
        timesteps=timesteps(exp.schedule.T, min(20, exp.schedule.T)),
        kind=config.model.kind,
        eta=0.0,
    )
    return lambda params: data.to_uint8(draw(params, 0, 0, 64))


class _Rate:
    """Steps a second since the last look."""

    def __init__(self):
        self.restart()

    def restart(self):
        self._steps, self._since = 0, time.perf_counter()

    def count(self):
        self._steps += 1

    def take(self):
        rate = self._steps / (time.perf_counter() - self._since)
        self.restart()
        return rate
