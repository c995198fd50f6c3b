"""Where the config becomes objects. Nothing else reads it but the `run` of each mode."""

import contextlib
import dataclasses
import hashlib
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from diffusion import data, gaussian, schedule
from diffusion.loss import WEIGHTINGS
from diffusion.networks.unet import UNet
from diffusion.runtime import mesh as meshes
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.files import write_json
from diffusion.runtime.lock import lock


class RunError(Exception):
    """What ends a run and is no bug; the message tells the user what was found and what to do."""


@contextlib.contextmanager
def naming(key):
    """Turn a ValueError within into a RunError that names the part of the config it came from."""
    try:
        yield
    except ValueError as error:
        raise RunError(f'{key}: {error}') from error


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes. It holds no random keys: those follow from (seed, step)."""

    step: jax.Array  # () int32, steps done
    params: Any
    ema: Any  # exponential moving average of params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Network:
    """A network without its parameters; those are a plain dict of arrays."""

    make: Any  # nnx.Rngs → nnx.Module

    def init(self, key):
        """Fresh parameters."""
        return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(key))))

    def net(self, params, *, dropout_key=None):
        """The callable (x_t (B, ...), t (B,)) → (B, ...); with dropout where a key is given."""
        graph, _ = nnx.split(nnx.eval_shape(lambda: self.make(nnx.Rngs(0))))
        module = nnx.merge(graph, params)
        if dropout_key is None:
            return module
        rngs = nnx.Rngs(dropout=dropout_key)
        return lambda x_t, t: module(x_t, t, deterministic=False, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What every mode needs."""

    schedule: schedule.Schedule
    network: Network
    optimizer: optax.GradientTransformation
    learning_rate: Any  # steps done → learning rate
    mesh: jax.sharding.Mesh

    def init(self, key):
        """The TrainState at step 0, EMA and parameters equal."""
        params = self.network.init(key)
        ema = jax.tree.map(jnp.copy, params)  # a donated buffer cannot serve twice
        return TrainState(jnp.int32(0), params, ema, self.optimizer.init(params))

    def abstract_state(self):
        """The shapes and shardings of the TrainState."""
        state = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            meshes.split_state(self.mesh, state),
        )


def build(config):
    """The Experiment that a config describes. Raises RunError, which names the key, where it describes none."""
    with naming('config.seed'):
        check_seed(config.seed)
    with naming('config.schedule'):
        noise_schedule = make_schedule(config.schedule)
    with naming('config.model.kind'):
        if config.model.kind not in gaussian.KINDS:
            raise ValueError(f'{config.model.kind!r} is none of {", ".join(gaussian.KINDS)}')
        gaussian.require_signal(noise_schedule, config.model.kind, noise_schedule.T)
    with naming('config.model'):
        network = make_network(config.model, config.data)
        jax.eval_shape(network.init, jax.random.key(0))
    with naming('config.mesh'):
        mesh = meshes.make_mesh(config.mesh.fsdp)
    with naming('config.train.loss'):
        if config.train.loss not in WEIGHTINGS:
            raise ValueError(f'{config.train.loss!r} is none of {", ".join(WEIGHTINGS)}')
    with naming('config.train'):
        optimizer, learning_rate = make_optimizer(config.train)
    return Experiment(noise_schedule, network, optimizer, learning_rate, mesh)


def check_seed(seed):
    """Raise ValueError for what cannot be a seed."""
    if not 0 <= seed < 2**31:
        raise ValueError(f'seed is {seed}, but must lie in [0, 2³¹)')


def make_schedule(config):
    """The Schedule that config.schedule describes."""
    if config.name not in schedule.SCHEDULES:
        raise ValueError(f'name is {config.name!r}, but must be one of {", ".join(schedule.SCHEDULES)}')
    if config.T < 1:
        raise ValueError(f'T is {config.T}, but a chain has at least one noise level')
    if config.name == 'cosine':
        return schedule.cosine(config.T, config.offset, config.max_beta)
    return schedule.SCHEDULES[config.name](config.T, config.beta_start, config.beta_end)


def make_network(model, images):
    """The Network that config.model describes, for images of config.data."""
    if model.dtype not in ('float32', 'bfloat16'):
        raise ValueError(f"dtype is {model.dtype!r}, but must be 'float32' or 'bfloat16'")

    def make(rngs):
        return UNet(
            image_size=images.image_size,
            image_channels=images.channels,
            channels=model.channels,
            multipliers=model.multipliers,
            num_blocks=model.num_blocks,
            attention_resolutions=model.attention_resolutions,
            dropout=model.dropout,
            groups=model.groups,
            dtype=jnp.dtype(model.dtype),
            rngs=rngs,
        )

    return Network(make)


def make_optimizer(config):
    """Adam behind a clipped gradient, and its learning rate as a function of the steps done."""
    for key in ('batch_size', 'num_steps', 'checkpoint_every', 'keep_checkpoints', 'log_every'):
        if config[key] < 1:
            raise ValueError(f'{key} is {config[key]}, but must be at least 1')
    for key in ('warmup_steps', 'grad_clip', 'sample_every'):
        if config[key] < 0:
            raise ValueError(f'{key} is {config[key]}, but must not be negative')
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f'ema_decay is {config.ema_decay}, but must lie in [0, 1)')
    if not 0 < config.learning_rate < float('inf'):
        raise ValueError(f'learning_rate is {config.learning_rate}, but must be positive')

    def learning_rate(step):
        return config.learning_rate * jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))

    clip = optax.clip_by_global_norm(config.grad_clip or float('inf'))
    return optax.chain(clip, optax.adam(learning_rate)), learning_rate


def load_images(config, split='train'):
    """One split of the images that config.data describes, uint8 (N, H, W, C)."""
    with naming('config.data'):
        return data.load(
            config.data.source,
            split,
            image_size=config.data.image_size,
            channels=config.data.channels,
            crop=config.data.crop,
        )


def open_checkpoints(config, workdir):
    """The checkpoints of a run."""
    return Checkpoints(os.path.join(workdir, 'checkpoints'), keep=config.train.keep_checkpoints)


# What a run is; but where the same images lie, and the precision of arithmetic, may change.
IDENTITY = ('data', 'model', 'schedule')
INCIDENTAL = ('data_dir', 'dtype')


def check_config(config, workdir):
    """Raise RunError where `workdir` holds a run of another network, schedule or data; name the differences."""
    path = os.path.join(workdir, 'config.json')
    try:
        with open(path, encoding='utf-8') as file:
            stored = json.load(file)
        if not isinstance(stored, dict) or not all(isinstance(stored.get(part, {}), dict) for part in IDENTITY):
            raise ValueError('it holds no config')
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise RunError(f'{path} cannot be read ({error}): restore it, or choose another --workdir') from error
    asked = json.loads(json.dumps(config.to_dict()))
    differences = [
        f'    config.{part}.{key}: {stored.get(part, {}).get(key)!r} there, {asked[part].get(key)!r} asked'
        for part in IDENTITY
        for key in sorted(asked[part].keys() | stored.get(part, {}).keys())
        if key not in INCIDENTAL and stored.get(part, {}).get(key) != asked[part].get(key)
    ]
    if differences:
        raise RunError(
            f'{workdir} holds another run:\n'
            + '\n'.join(differences)
            + '\nAsk for the same, or choose another --workdir.'
        )


def remember_config(config, workdir):
    """Write config.json, by which later runs on this workdir are checked."""
    write_json(os.path.join(workdir, 'config.json'), config.to_dict())


@contextlib.contextmanager
def hold(workdir):
    """Keep other trainings off `workdir`. Raises RunError where one is under way, or it cannot be written to."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(workdir))
        except OSError as error:
            raise RunError(f'--workdir={workdir} cannot be used: {error}') from error
        yield


def digest(params):
    """What tells one set of parameters from another: a SHA-256."""
    result = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        result.update(np.asarray(leaf).tobytes())
    return result.hexdigest()


def load_params(exp, config, workdir, weights):
    """(step, params) of the newest checkpoint. Raises RunError where there is none.

    weights: 'ema' or 'raw'; ValueError for another.
    """
    if weights not in ('ema', 'raw'):
        raise ValueError(f"weights is {weights!r}, but must be 'ema' or 'raw'")
    if not os.path.isdir(os.path.join(workdir, 'checkpoints')):
        raise RunError(
            f'there is no run in {workdir} (no folder checkpoints/ in it): train one first with --mode=train'
        )
    check_config(config, workdir)
    name = {'ema': 'ema', 'raw': 'params'}[weights]
    with open_checkpoints(config, workdir) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise RunError(f'there is no complete checkpoint in {workdir}/checkpoints yet: train on with --mode=train')
        (params,) = checkpoints.restore(step, **{name: getattr(exp.abstract_state(), name)})
    return step, params
