"""--mode=train: the training step, and the loop around it."""

import functools
import math
import os
import time

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from diffusion import data, experiment, generate
from diffusion.experiment import RunError, TrainState
from diffusion.loss import loss
from diffusion.report.grid import save_grid
from diffusion.runtime import mesh as meshes
from diffusion.runtime.interrupt import EXIT_STATUS, Interrupt
from diffusion.runtime.writer import Writer
from diffusion.schedule import timesteps


def show(key, images, *, flip):
    """What the network is shown of images, uint8 (B, H, W, C): floats in [−1, 1], with `flip` half of them mirrored."""
    x0 = data.to_float(images)
    if flip:
        mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
        x0 = jnp.where(mirrored, x0[:, :, ::-1], x0)
    return x0


def train_step(state, images, indices, *, exp, seed, kind, weighting, ema_decay, flip):
    """One step of Adam on the batch images[indices], and the EMA of the parameters it gives.

    state: TrainState; images: (N, H, W, C) uint8; indices: (B,) int32, or None where the images are the
    batch. All randomness follows from (seed, state.step). Returns the next TrainState and {'loss', 'grad_norm',
    'param_norm', 'learning_rate'}: the gradient's norm before clipping, the parameters' after the step.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    flip_key, loss_key, dropout_key = jax.random.split(key, 3)
    x0 = show(flip_key, images if indices is None else images[indices], flip=flip)

    def mean_loss(params):
        net = exp.network.net(params, dropout_key=dropout_key)
        return loss(loss_key, exp.schedule, net, x0, kind=kind, weighting=weighting).mean()

    value, gradient = jax.value_and_grad(mean_loss)(state.params)
    updates, opt_state = exp.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    metrics = {
        'loss': value,
        'grad_norm': optax.global_norm(gradient),
        'param_norm': optax.global_norm(params),
        'learning_rate': exp.learning_rate(state.step),
    }
    return TrainState(state.step + 1, params, ema, opt_state), metrics


def run(config, workdir):
    """Train, or go on from the newest checkpoint, to train.num_steps. Returns the process's exit status."""
    config = experiment.resolve(config, workdir)
    experiment.check_config(config, workdir)
    exp = experiment.build(config)
    train = config.train
    if train.batch_size % exp.mesh.size:
        raise RunError(
            f'config.train.batch_size is {train.batch_size}, which {exp.mesh.size} devices cannot share evenly'
        )
    images = experiment.load_images(config)
    experiment.check_config(config, workdir, images)
    if train.batch_size > len(images):
        raise RunError(
            f'config.train.batch_size is {train.batch_size}, but there are only {len(images)} images: '
            'ask for a smaller batch, or find more pictures'
        )
    where = f'checkpoints in {workdir}/checkpoints'

    with (
        experiment.hold(workdir),
        experiment.open_checkpoints(config, workdir) as checkpoints,
        Interrupt() as interrupt,
    ):
        state = restore(exp, checkpoints, seed=config.seed)
        step = int(state.step)
        if step >= train.num_steps:
            print(f'complete: {step} steps of train.num_steps={train.num_steps}; {where}')
            return 0
        experiment.remember_config(config, workdir, images)
        num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        print(
            f'{len(images)} images of {config.data.source}; {num_params:,} parameters; {exp.mesh.size} × '
            f'{jax.devices()[0].device_kind}; step {step} of {train.num_steps}; {where}; compiling …',
            flush=True,
        )
        with Writer(os.path.join(workdir, 'logs'), step=step) as writer:
            step = _loop(config, workdir, exp, state, images, checkpoints, writer, interrupt)
    if step < train.num_steps:
        saved = f'after step {step}, which is saved' if step else 'before the first step'
        print(f'{interrupt}: stopped {saved}; the same command goes on')
        return EXIT_STATUS
    print(f'complete: {step} steps; {where}')
    return 0


def restore(exp, checkpoints, *, seed):
    """The TrainState of the newest checkpoint, or a new one where there is none yet."""
    abstract = exp.abstract_state()
    step = checkpoints.latest()
    if step is None:
        return jax.jit(exp.init, out_shardings=_shardings(abstract))(jax.random.key(seed))
    params, ema, opt_state = checkpoints.restore(
        step, params=abstract.params, ema=abstract.ema, opt_state=abstract.opt_state
    )
    return TrainState(jax.device_put(jnp.int32(step), abstract.step.sharding), params, ema, opt_state)


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
    )
    out_shardings = _shardings(state), meshes.replicated(exp.mesh)
    with experiment.naming('config.train'):
        return jax.jit(step_fn, donate_argnums=0, out_shardings=out_shardings).lower(state, images, indices).compile()


def feed(config, exp, images, start):
    """What `train_step` takes of each step from `start` on: (images, indices) on the devices.

    data.placement 'device' keeps all images there, and only their numbers are sent; 'host' sends batches,
    gathered ahead of the step that needs them; 'auto' keeps those that fit. Raises RunError for another placement.
    """
    placement, stop = config.data.placement, config.train.num_steps
    if placement not in ('auto', 'device', 'host'):
        raise RunError(f"config.data.placement is {placement!r}, but must be 'auto', 'device' or 'host'")
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


def _loop(config, workdir, exp, state, images, checkpoints, writer, interrupt):
    """Steps until train.num_steps or an interrupt, the last of which is saved. Returns the steps done."""
    train = config.train
    step = saved = int(state.step)
    batches = feed(config, exp, images, step)
    batch = next(batches)
    compiled_step = compile_step(config, exp, state, *batch)
    draw = None
    rate = _Rate()

    def settle(step, metrics):
        """Look at a step's numbers, once the next step is under way: the devices do not wait for the host."""
        values = {name: float(value) for name, value in metrics.items()}
        if not all(math.isfinite(value) for value in values.values()):
            kept = f'the checkpoint of step {saved} is good' if saved else 'there is no checkpoint yet'
            found = ', '.join(f'{name} {values[name]}' for name in ('loss', 'grad_norm', 'param_norm'))
            raise RunError(
                f'{found} at step {step}; {kept}. '
                'A lower train.learning_rate or train.grad_clip, or a longer train.warmup_steps, may help.'
            )
        rate.count()
        bar.update()
        if step % train.log_every == 0 or step == train.num_steps:
            values['images_per_second'] = rate.take() * train.batch_size
            bar.set_postfix({'loss': f'{values["loss"]:.4f}', 'images/s': f'{values["images_per_second"]:.0f}'})
            writer.scalars(step, **values)

    with tqdm(total=train.num_steps, initial=step, desc='train', unit='step', dynamic_ncols=True) as bar:
        pending = None
        while step < train.num_steps and not interrupt:
            state, metrics = compiled_step(state, *batch)
            step += 1
            batch = next(batches, None)  # on its way to the devices while they work
            if pending:
                settle(*pending)
            pending = step, metrics
            saving = step % train.checkpoint_every == 0
            sampling = train.sample_every and step % train.sample_every == 0
            if saving or sampling:
                settle(*pending)
                pending = None
            if saving:
                _save(checkpoints, step, state)
                saved = step
            if sampling:
                draw = draw or progress_sampler(config, exp, state.ema)
                path = os.path.join(workdir, 'samples', 'progress', f'{step:08d}.png')
                writer.image(step, 'samples', save_grid(path, draw(state.ema)))
            if saving or sampling:
                rate.restart()
        if pending:
            settle(*pending)
        if step > saved:
            _save(checkpoints, step, state)
    return step


def _save(checkpoints, step, state):
    checkpoints.save(step, params=state.params, ema=state.ema, opt_state=state.opt_state)


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
    return lambda params: draw(params, 0, 0, 64)


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
