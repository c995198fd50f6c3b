"""--mode=train: the training step, and the loop around it."""

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from diffusion import build, data, workdir
from diffusion.build import Experiment, Skipped, TrainState
from diffusion.conditions import all_classes, condition
from diffusion.loss import History, draw, importance_weights, loss_of, update_history
from diffusion.metrics import colour
from diffusion.modes.sample import make_sampler
from diffusion.networks import Program
from diffusion.report.grid import save_grid
from diffusion.runtime import hosts, memory, mesh
from diffusion.runtime.checkpoints import Checkpoints
from diffusion.runtime.compilation import compiling, deterministic
from diffusion.runtime.interrupt import EXIT_STATUS, Interrupt, leaves, until
from diffusion.runtime.keys import domain_key
from diffusion.runtime.logs import Writer
from diffusion.schedule import timesteps
from diffusion.util import FileLock, RunError, first_line, naming, progress, say, warn, write_json

# Advice for when memory runs out.
MEMORY = (
    'lower config.train.batch_size, or raise config.train.accumulate; config.model.remat=True and '
    'config.model.dtype=bfloat16 take less as well'
)
PREVIEW_IMAGES, PREVIEW_STEPS = 64, 20
EARLY_IMAGES = 16
EARLY_SHEETS = (50, 100, 200, 500, 1000, 2000, 5000)  # steps


def run(config: ConfigDict, path: str) -> int:
    """Train, or resume from the newest checkpoint, until train.num_steps.

    Args:
        config: the config of the command.
        path: the workdir.

    Returns:
        0 if all steps are done, EXIT_STATUS if a signal stopped the run (after it was saved).

    Raises:
        RunError: the config, the images or the workdir do not allow it, or training diverged.
    """
    config = workdir.resolve(config, path, training=True)
    exp = build.build(config)
    require_equal_parts(config, exp)
    require_labels(config)
    require_loss(config)
    require_memory(config, exp)
    workdir.check_config(config, path)  # before the images are decoded
    require_shards(config)
    images = build.load_training_images(config)
    config.data.shards = images.num_shards  # chosen, if the config and the run left it open
    require_enough(config, images)

    with workdir.lock(path) as lock, contextlib.ExitStack() as stack:
        interrupt = Interrupt()
        if jax.process_count() > 1:  # hosts stop together, at the earliest before the first step
            stack.enter_context(interrupt)
        workdir.check_config(config, path, images)  # once more: now no other process can change it
        workdir.use_compile_cache(config)
        checkpoints = stack.enter_context(workdir.open_checkpoints(config, path, writing=True))
        state = restore(config, exp, path, checkpoints)
        about = describe(exp, state)
        start, num_steps = int(state.step), config.train.num_steps
        if start >= num_steps:
            say(f'complete: {start} steps of train.num_steps={num_steps}; checkpoints in {checkpoints.directory}')
            return 0
        stored = workdir.write_config(config, path, images, start)
        if start:
            leaves('the same command continues from the last checkpoint')

        classes = f' in {config.model.num_classes} classes' if config.data.labels else ''
        say(f'{images.record["count"]} images of {config.data.source}{classes}; step {start} of {num_steps}')
        if not start and not os.path.exists(os.path.join(path, 'data')):
            say('the same command with --mode=data shows what the network will see')
        checkpoints.reserve(**state.trees())
        state = exp.packed(state)
        batches = feed(config, exp, images, start, stop=lambda: jax.process_count() == 1 and bool(interrupt))
        first = next(batches)
        began = time.perf_counter()
        with compiling('the training step'):
            step_fn = compile_step(config, exp, state, *first)
        memory.require(memory.of_program(step_fn.compiled), 'the training step, as XLA plans it,', MEMORY)
        flops = step_fn.flops / exp.mesh.size
        took = time.perf_counter() - began
        say(f'{about}; {flops / 1e9:.3g} GFLOP per step and device; compiled in {took:.1f} s')
        preview = Preview(config, exp, path, images.record['channel_means'], state.ema, start)

        log = stack.enter_context(Log(os.path.join(path, 'logs'), config, exp, flops, start))
        saver = Saver(config, exp, path, stored, checkpoints, lock, log, start)
        stopped = hosts.AnyHost(exp.mesh)
        if jax.process_count() == 1:  # until now, a signal ended the process at once
            stack.enter_context(interrupt)
        state = loop(
            step_fn,
            state,
            itertools.chain([first], batches),
            log=log,
            saver=saver,
            preview=preview,
            stop=lambda: stopped(interrupt),
            **{key: config.train[key] for key in ('num_steps', 'log_every', 'max_bad_steps')},
        )

    step, skipped = int(state.step), int(state.skipped.total)
    if skipped:
        say(f'{skipped} steps were skipped because their loss or gradient was not finite')
    if step < num_steps:
        saved = f'after step {step}, which is saved' if step else 'before the first step'
        say(f'{interrupt or "a signal to another host"}: stopped {saved}; the same command resumes')
        return EXIT_STATUS
    say(f'complete: {step} steps; checkpoints in {checkpoints.directory}')
    return 0


def loop(
    step_fn: Callable,
    state: TrainState,
    batches: Iterator[tuple],
    *,
    num_steps: int,
    log_every: int,
    max_bad_steps: int,
    log: 'Log',
    saver: 'Saver',
    preview: 'Preview',
    stop: Callable[[], bool],
) -> TrainState:
    """Do training steps until there are `num_steps`, or until `stop()`; save the last one.

    The host reads metrics every `log_every` steps only.

    Raises:
        RunError: when metrics were read, the last `max_bad_steps` steps were not finite; or a batch cannot be read; or
            the last step could not be saved.
    """
    step, metrics = int(state.step), None
    while step < num_steps and not stop():
        previous = metrics
        try:
            batch = next(batches, None)
        except (OSError, ValueError) as error:  # pictures that could be read before, for example
            if jax.process_count() == 1:  # hosts save together, and the others may have their batch
                saver.finish(step, state)
            raise RunError(f'the batch of step {step} cannot be read: {first_line(error)}; {saver.newest()}') from error
        if batch is None:  # stopped by a signal while waiting for the batch
            break
        state, metrics = step_fn(state, *batch)
        step += 1
        jax.block_until_ready(previous)  # at most two steps in flight: each takes memory, and a signal waits for them
        log.advance()
        if step % log_every == 0 or step == num_steps:
            values = log.write(step, metrics)
            if values['skipped_in_a_row'] >= max_bad_steps:
                raise RunError(diverged(step, values, saver))
        if saver.due(step):
            with log.paused():
                saver.save(step, state)
        if preview.due(step):
            with log.paused():
                preview.draw(step, state.ema, log)
    saver.finish(step, state)
    return state


def train_step(
    state: TrainState,
    images: jax.Array,
    indices: jax.Array | None,
    labels: jax.Array | None = None,
    *,
    exp: Experiment,
    seed: int,
    kind: str,
    weighting: str,
    learned: bool = False,
    ema_decay: float,
    flip: bool,
    label_dropout: float = 0.0,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Do one optimizer step on the batch images[indices], and update the EMA ē of the parameters θ.

        θ ← θ − Adam(∇_θ mean L(x_0, t, ε)),    ē ← d·ē + (1−d)·θ,    d = min(ema_decay, (1+k)/(10+k)) in step k

    If the state has a history of losses, levels are drawn by it, the losses in the mean are weighted for that, and the
    history takes up those of this step.

    A step whose loss, gradient or parameters are not finite changes nothing but the counts of steps.

    Args:
        state: the TrainState before the step.
        images: (N, H, W, C) uint8.
        indices: (B,) int32, the batch; None if `images` are the batch.
        labels: (N,) int32, the classes of `images`; None for an unconditional network.
        exp: schedule, network, optimizer, mesh and implementation.
        seed: all randomness follows from (seed, state.step).
        kind: what the network predicts, a key of KINDS.
        weighting: which loss, a key of WEIGHTINGS.
        learned: whether the network learns the variance.
        ema_decay: the largest d.
        flip: mirror each image with probability 1/2.
        label_dropout: probability with which a label is replaced by −1, no class.
        accumulate: number of parts into which each device divides its share of the batch; their gradients are
            averaged. Levels and noise do not depend on it, dropout does.

    Returns:
        The TrainState after the step, and scalar metrics: 'loss', 'grad_norm' (before clipping), 'param_norm' (after
        the step), 'learning_rate', 'skipped' and 'skipped_in_a_row'.
    """
    flip_key, noise_key, dropout_key, label_key = (
        jax.random.fold_in(domain_key(seed, domain), state.step) for domain in ('flips', 'noise', 'dropout', 'labels')
    )
    x0 = augment(flip_key, images if indices is None else images[indices], flip=flip)
    history: History | None = mesh.whole(exp.mesh, state.history)
    t, eps = draw(noise_key, exp.schedule, x0.shape, weighting=weighting, history=history)
    batch = [x0, t, eps]
    if history is not None:
        batch += [importance_weights(history, t), jnp.arange(len(t), dtype=jnp.int32)]
    if labels is not None:
        batch.append(drop_labels(label_key, labels if indices is None else labels[indices], label_dropout))
    loss, size = loss_of(weighting, learned=learned), len(t)

    def mean_loss(params, dropout_key, x0, t, eps, *rest):
        weights, labels = (rest[:2], rest[2:]) if history is not None else ((), rest)
        net = exp.network.net(exp.implementation.unpack(params), *labels, dropout_key=dropout_key)
        losses = loss(exp.schedule, net, x0, t, eps, kind)
        if not weights:
            return losses.mean(), None
        weight, place = weights
        # Losses go to their places in the whole batch; × parts, so that the mean over parts restores them.
        return (weight * losses).mean(), jnp.zeros(size, jnp.float32).at[place].set(losses * (size // len(losses)))

    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
    params = mesh.whole(exp.mesh, state.params)
    if accumulate == 1:
        (value, losses), gradient = value_and_grad(params, dropout_key, *batch)
    else:
        parts = (exp.mesh, value_and_grad, params, dropout_key, batch, accumulate)
        (value, losses), gradient = mesh.mean_over_parts(*parts, fold=exp.implementation.fold)
    if history is not None:
        history = update_history(history, *mesh.whole(exp.mesh, (t, losses)))
    gradient = mesh.like_state(exp.mesh, gradient)

    updates, opt_state = exp.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step.astype(jnp.float32)  # JAX_ENABLE_X64 would make ratios of int32 float64
    decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
    ema = optax.incremental_update(params, state.ema, 1 - decay)

    grad_norm, param_norm = optax.global_norm(gradient), optax.global_norm(params)
    good = jnp.isfinite(jnp.array([value, grad_norm, param_norm])).all()
    new, old = (params, ema, opt_state, history), (state.params, state.ema, state.opt_state, state.history)
    params, ema, opt_state, history = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
    skipped = Skipped(state.skipped.total + ~good, jnp.where(good, 0, state.skipped.in_a_row + 1))
    metrics = {
        'loss': value,
        'grad_norm': grad_norm,
        'param_norm': param_norm,
        'learning_rate': exp.learning_rate(state.step - state.skipped.total),
        'skipped': skipped.total,
        'skipped_in_a_row': skipped.in_a_row,
    }
    return TrainState(state.step + 1, params, ema, opt_state, skipped, history), metrics


def augment(key: jax.Array, images: jax.Array, *, flip: bool) -> jax.Array:
    """Turn image bytes into network inputs.

    Args:
        key: typed PRNG key.
        images: (B, H, W, C) uint8.
        flip: mirror each image with probability 1/2.

    Returns:
        (B, H, W, C) float32 in [−1, 1].
    """
    x0 = jnp.asarray(data.to_float(images))
    if flip:
        mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
        x0 = jnp.where(mirrored, x0[:, :, ::-1], x0)
    return x0


def drop_labels(key: jax.Array, labels: jax.Array, probability: float) -> jax.Array:
    """Replace each label by −1, no class, with a given probability (Ho and Salimans 2022, arXiv:2207.12598, Alg. 1).

    Args:
        key: typed PRNG key.
        labels: (B,) int32.
        probability: in [0, 1).

    Returns:
        (B,) int32.
    """
    return jnp.where(jax.random.bernoulli(key, probability, labels.shape), -1, labels) if probability else labels


def compile_step(config: ConfigDict, exp: Experiment, state: TrainState, images: jax.Array, *rest: Any) -> Program:
    """Compile `train_step` with everything that stays the same from step to step; it reuses the state's buffers.

    `images` and the rest are a batch of `feed`.
    """
    step_fn = functools.partial(
        train_step,
        exp=exp,
        seed=config.seed,
        kind=config.model.kind,
        weighting=config.train.loss,
        learned=config.model.variance == 'learned',
        ema_decay=config.train.ema_decay,
        flip=config.data.flip,
        label_dropout=config.train.label_dropout,
        accumulate=config.train.accumulate,
    )
    parts = exp.mesh.size * config.train.accumulate
    with naming('config.train'):
        return exp.implementation.compile(
            step_fn,
            state,
            images,
            *rest,
            out_shardings=(_shardings(state), mesh.replicated(exp.mesh)),
            donate=(0,),
            largest_activation=config.train.batch_size // parts * config.data.image_size**2 * config.model.channels,
            options=deterministic(exp.mesh.devices.flat[0].platform) if config.train.deterministic else {},
        )


def restore(config: ConfigDict, exp: Experiment, path: str, checkpoints: Checkpoints) -> TrainState:
    """Return the TrainState of the newest intact checkpoint, or the initial one if no checkpoint was ever saved.

    Raises:
        RunError: the checkpoint is of another run, all are damaged, or all are gone.
    """
    abstract = exp.abstract_state()
    with workdir.intact():
        there, saved = checkpoints.steps(), workdir.last_saved(path)
        accept, trees = workdir.require_same_run(config, path), abstract.trees()
        found = checkpoints.restore_newest(say, accept, optional=('history',), **trees)
    if found is None:
        workdir.require_no_history(config, path)
        if os.path.exists(os.path.join(path, 'logs', 'metrics.jsonl')):
            say(f'no checkpoint was saved: beginning at step 0, with new logs in {path}/logs')
        return exp.initial_state(domain_key(config.seed, 'init'))
    step, arrays = found
    if saved is not None and saved > there[0]:
        warn(f'step {saved} was saved, but its checkpoint is gone: the steps after {there[0]} are done again')
    checkpoints.put_aside(step)
    restored = dict(zip(trees, arrays, strict=True))
    if abstract.history is not None and restored['history'] is None:  # the run had another loss until now
        shardings = _shardings(abstract.history)
        restored['history'] = jax.tree.map(mesh.put_whole, exp.init_history(), shardings)
    return TrainState(mesh.put_whole(np.int32(step), abstract.step.sharding), **restored)


def feed(
    config: ConfigDict,
    exp: Experiment,
    images: data.Images,
    start: int,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple]:
    """Yield (images, indices) on the devices for each step from `start` on, as `train_step` takes them.

    With data.labels, their labels follow.

    With data.placement 'device' all images are kept on the devices and only indices are sent; with 'host' batches are
    sent, gathered ahead of the step that needs them; 'auto' keeps the images on the devices if they fit and each host
    has all of them. A batch that does not come, because a file system hangs, is not waited for once `stop()`: the
    batches end.

    Raises:
        RunError: data.placement is 'device', but the decoded images are not kept, or not all on each host.
    """
    placement, end = config.data.placement, config.train.num_steps
    if placement == 'device' and not config.data.cache:
        raise RunError(
            "config.data.placement is 'device', but config.data.cache=False decodes images anew for each batch: "
            "use placement 'host', or cache=True"
        )
    index, count, shards = jax.process_index(), jax.process_count(), images.num_shards
    divided = count > 1 and shards > 1
    if placement == 'device' and divided:
        raise RunError(
            f"config.data.placement is 'device', but with data.shards={shards} each of {count} hosts has only its own "
            "images: use placement 'host', or shards=1"
        )
    sizes = [len(shard) for shard in images.shards] if shards > 1 else len(images)
    order = data.Order(sizes, config.train.batch_size, config.seed, host=index, hosts=count, shards=shards)
    sharding = mesh.split_batch(exp.mesh)
    fits = config.data.cache and not divided and mesh.fits(exp.mesh, images.images.nbytes)
    labels = [np.asarray(images.labels)] if config.data.labels else []
    if placement == 'device' or (placement == 'auto' and fits):
        everything = [mesh.put(array, mesh.replicated(exp.mesh)) for array in (images[:], *labels)]
        return ((everything[0], mesh.put(order[step], sharding), *everything[1:]) for step in range(start, end))
    batches = until(stop, data.prefetch(images, order, start, end))
    return (
        (mesh.put(batch, sharding), None, *(mesh.put(array[order[step]], sharding) for array in labels))
        for batch, step in zip(batches, range(start, end), strict=False)
    )


def require_equal_parts(config: ConfigDict, exp: Experiment) -> None:
    """Raise RunError unless devices and accumulation divide the batch evenly."""
    unit = exp.mesh.size * config.train.accumulate
    if config.train.batch_size % unit:
        raise RunError(
            f'config.train.batch_size is {config.train.batch_size}, which {exp.mesh.size} devices with '
            f'train.accumulate={config.train.accumulate} cannot divide evenly: use a multiple of {unit}'
        )


def require_shards(config: ConfigDict) -> None:
    """Raise RunError unless a batch has equally many images of each of data.shards, if their number is known."""
    shards = config.data.shards or 1
    if config.train.batch_size % shards:
        raise RunError(
            f'config.train.batch_size is {config.train.batch_size}, which data.shards={shards} cannot divide evenly: '
            f'use a multiple of {shards}, or for a new run fewer shards'
        )


def require_labels(config: ConfigDict) -> None:
    """Raise RunError if labels are to be dropped, but there are none."""
    if config.train.label_dropout and not config.data.labels:
        raise RunError(
            f'config.train.label_dropout is {config.train.label_dropout:g}, but data.labels=False trains without '
            'labels: use --config.data.labels=True, or label_dropout=0'
        )


def require_loss(config: ConfigDict) -> None:
    """Raise RunError if train.loss does not train what model.variance asks for."""
    learned = config.model.variance == 'learned'
    try:
        loss_of(config.train.loss, learned=learned)
    except ValueError as error:
        other = 'fixed' if learned else 'learned'
        raise RunError(f'config.train.loss: {error} (config.model.variance={other!r})') from error


def require_memory(config: ConfigDict, exp: Experiment) -> None:
    """Raise RunError unless the state and a gradient fit on a device: nothing smaller than the network would help."""
    state = exp.abstract_state()
    memory.require(
        held_by_device(state)
        + sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params)),
        'the state of this network (parameters, gradient, EMA and optimizer)',
        f'lower config.model.channels={config.model.channels}, shorten config.model.multipliers='
        f"{tuple(config.model.multipliers)}, or for 'dit' lower config.model.depth={config.model.depth}; several "
        'devices can share the state (config.mesh.fsdp)',
    )


def held_by_device(state: TrainState) -> int:
    """Return the bytes of a TrainState that each device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )


def require_enough(config: ConfigDict, images: data.Images) -> None:
    """Raise RunError if a batch has more images of the data set, or of one of its shards, than there are."""
    record, batch = images.record, config.train.batch_size
    if batch > record['count']:
        raise RunError(
            f'config.train.batch_size is {batch}, but there are only {record["count"]} images: use a smaller batch, or '
            'add pictures'
        )
    fewest = min(record.get('counts', [record['count']]))
    if batch // config.data.shards > fewest:
        raise RunError(
            f'config.train.batch_size is {batch}, so {batch // config.data.shards} images from each of data.shards='
            f'{config.data.shards}, but one has only {fewest}: use a smaller batch, or for a new run fewer shards'
        )


def describe(exp: Experiment, state: TrainState) -> str:
    """Return one line with hosts, devices, mesh, parameters, and state per device."""
    devices, kind = exp.mesh, exp.mesh.devices.flat[0].device_kind
    several = f'{jax.process_count()} hosts, ' if jax.process_count() > 1 else ''
    return (
        f'{several}{devices.size} × {kind} as data {devices.shape["data"]} × fsdp {devices.shape["fsdp"]}; '
        f'{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters; '
        f'{held_by_device(state) / 1e6:.1f} MB of state per device'
    )


def diverged(step: int, values: dict[str, float], saver: 'Saver') -> str:
    """Return the message for a run whose steps are no longer finite."""
    found = ', '.join(f'{name} {values[name]}' for name in ('loss', 'grad_norm', 'param_norm'))
    return (
        f'{found} at step {step}: the last {values["skipped_in_a_row"]:.0f} steps were not finite and changed nothing; '
        f'{saver.newest()}. A lower train.learning_rate or train.grad_clip, or a longer train.warmup_steps, may help.'
    )


class Log:
    """Metrics of a run, on the first host: the progress bar, metrics.jsonl and TensorBoard events."""

    def __init__(self, folder: str, config: ConfigDict, exp: Experiment, flops: float, start: int):
        self._folder, self._batch_size = folder, config.train.batch_size
        self._flops, self._peak = flops, mesh.peak_flops(exp.mesh.devices.flat[0].device_kind)
        self._bar = progress(
            total=config.train.num_steps, initial=start, doing='train', unit='step', hidden=not hosts.is_first()
        )
        self._files = contextlib.ExitStack()
        self._writer: Writer | None = None
        self._extra: dict[str, float] = {}
        self._steps, self._seconds, self._since = 0, 0.0, time.perf_counter()
        self.reopen(start)

    def __enter__(self) -> 'Log':
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
        self._files.close()

    def reopen(self, step: int) -> None:
        """Open the files, also when the folder was removed; entries beyond `step` are dropped."""
        self._files.close()
        if hosts.is_first():
            self._writer = self._files.enter_context(Writer(self._folder, step=step, warn=warn))

    def advance(self) -> None:
        """Count one step."""
        self._steps += 1
        self._bar.update()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time within the context as training."""
        self._seconds += time.perf_counter() - self._since
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def write(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """Write a step's metrics and the speed since the last call; return the metrics as floats."""
        values = {name: float(value) for name, value in mesh.fetch(metrics).items()}
        with self.paused():
            rate = self._steps / self._seconds
            self._steps, self._seconds = 0, 0.0
        speed = {'images_per_second': rate * self._batch_size}
        shown = {'loss': f'{values["loss"]:.4f}', 'images/s': f'{speed["images_per_second"]:.0f}'}
        if self._peak:
            speed['utilisation'] = rate * self._flops / self._peak
            shown['use'] = f'{speed["utilisation"]:.0%}'
        if peak := memory.peak():
            speed['peak_bytes'] = peak
        self._bar.set_postfix(shown, refresh=False)
        if self._writer:
            self._writer.scalars(step, **values, **speed, **self._extra)
        return values

    def image(self, step: int, image: np.ndarray, **scalars: float) -> None:
        """Write a picture, (H, W, C) uint8; the scalars are written with each step's metrics from now on."""
        self._extra |= scalars
        if self._writer:
            self._writer.image(step, 'samples', image)


class Saver:
    """Saves checkpoints in the background. A failed save is reported and repeated; it does not end the run."""

    def __init__(
        self,
        config: ConfigDict,
        exp: Experiment,
        path: str,
        stored: dict[str, Any],
        checkpoints: Checkpoints,
        lock: FileLock | None,
        log: Log,
        start: int,
    ):
        self._path, self._stored = path, stored  # what config.json holds; each checkpoint keeps a copy
        self._exp, self._checkpoints, self._lock, self._log = exp, checkpoints, lock, log
        self._every, self._log_every = config.train.checkpoint_every, config.train.log_every
        self._saved = self._retry = start

    def due(self, step: int) -> bool:
        """Return whether a checkpoint should be saved after this step; the same on all hosts."""
        if step % self._every == 0 or step == self._retry:
            return True
        if jax.process_count() > 1:
            return False
        return self._checkpoints.failed or (step % self._log_every == 0 and self._moved())

    def save(self, step: int, state: TrainState) -> None:
        """Copy the state and start to write it."""
        try:
            if self._moved():
                self._recreate(step)
            self._checkpoints.save(step, self._stored, **self._exp.unpacked(state).trees())
            self._saved = step
        except (OSError, ValueError) as error:
            self._saved = max(self._checkpoints.steps(), default=0)
            self._retry = step + self._log_every
            warn(f'the checkpoint of step {step} could not be saved ({first_line(error)}); it will be tried again')

    def _moved(self):
        """Whether the workdir was removed or moved during the run."""
        return self._lock is not None and self._lock.lost()

    def _recreate(self, step):
        """Make the workdir again, with everything that a run consists of."""
        try:
            if self._lock:
                self._lock.acquire()
        except BlockingIOError as error:
            raise RunError(f'{self._path} was removed or moved during this run, and now {error}') from error
        if hosts.is_first():
            write_json(os.path.join(self._path, 'config.json'), self._stored)
        self._log.reopen(step)
        warn(f'{self._path} was removed or moved during the run; it was created again, and continues at step {step}')

    def finish(self, step: int, state: TrainState) -> None:
        """Save the last step, and wait until it is written.

        Raises:
            RunError: it could not be written.
        """
        if step > self._saved:
            self.save(step, state)
        try:
            self._checkpoints.wait()
        except (OSError, ValueError) as error:
            self._saved = max(self._checkpoints.steps(), default=0)
            warn(first_line(error))
        if self._saved < step:
            raise RunError(
                f'step {step} could not be saved in {self._checkpoints.directory}; the newest checkpoint there is of '
                f'step {self._saved}, from which the same command resumes'
            )

    def newest(self) -> str:
        """Return which checkpoint is good, in words."""
        if self._saved or self._checkpoints.steps():  # an imported run has a checkpoint of step 0
            return f'the checkpoint of step {self._saved} is good'
        return 'there is no checkpoint yet'


class Preview:
    """Sheets of images from the EMA weights (DDIM, 20 steps, always the same x_T), to watch the network learn.

    The sheets before the first `train.sample_every` steps, after EARLY_SHEETS steps, show fewer images.
    """

    def __init__(self, config: ConfigDict, exp: Experiment, path: str, data_means: list[float], ema: Any, start: int):
        """Compile the sampler now if any sheet will be drawn: in the loop, a signal would have to wait for it."""
        self._every, self._num_steps = config.train.sample_every, config.train.num_steps
        self._folder = os.path.join(path, 'samples', 'progress')
        self._num_classes = config.model.num_classes
        self._data_means = np.asarray(data_means)
        self._colours_were_right = False
        regular = (start // self._every + 1) * self._every if self._every else 0
        if any(start < step <= self._num_steps and self.due(step) for step in (*EARLY_SHEETS, regular)):
            try:
                self._sampler = _compile_preview(config, exp, ema)
            except RunError as error:
                self._give_up(error, str(error))

    def due(self, step: int) -> bool:
        """Return whether a sheet should be drawn after this step."""
        return self._every > 0 and (step % self._every == 0 or (step in EARLY_SHEETS and step < self._every))

    def _give_up(self, error, why):
        """Train on without sheets if there is no memory for them. Several hosts would have to agree on it."""
        if not why or jax.process_count() > 1:
            raise error
        warn(f'no sheets of samples are drawn: {why}')
        self._every = 0

    def draw(self, step: int, ema: Any, log: Log) -> None:
        """Draw and write a sheet; warn if its colours are not those of the data."""
        count = EARLY_IMAGES if step < self._every else PREVIEW_IMAGES
        try:
            parts = [self._sampler(ema, 0, i, i + EARLY_IMAGES) for i in range(0, count, EARLY_IMAGES)]
        except jax.errors.JaxRuntimeError as error:
            self._give_up(error, memory.exhausted(error))
            return
        images = data.to_uint8(np.concatenate(parts))
        if not hosts.is_first():
            return
        path = os.path.join(self._folder, f'{step:08d}.png')
        drift, warning = colour.drift(images, self._data_means)
        try:
            log.image(step, save_grid(path, images, classes=self._num_classes), colour_drift=float(np.abs(drift).max()))
        except OSError as error:
            warn(f'{path} could not be written ({error}); training continues without it')
        late = 2 * step >= self._num_steps
        if warning and (self._colours_were_right or late):  # the first sheets are noise
            warn(f'{warning} at step {step}')
        self._colours_were_right |= not warning


def _compile_preview(config, exp, ema):
    size, T = config.data.image_size, exp.schedule.T
    return make_sampler(
        exp,
        ema,
        (size, size, config.data.channels),
        batch_size=EARLY_IMAGES,
        net_of=condition(exp, all_classes(config)),
        timesteps=timesteps(T, min(PREVIEW_STEPS, T)),
        kind=config.model.kind,
        eta=0.0,
    )


def _shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
