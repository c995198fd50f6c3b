"""Where the config becomes objects.

It is read here and in the modules of the modes; the modules of the paper and the suppliers are given what they need.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from diffusion import data, gaussian, rules, schedule
from diffusion.networks.unet import UNet
from diffusion.runtime import distributed
from diffusion.runtime import mesh as meshes
from diffusion.runtime.checkpoint import Checkpoints, DamagedError
from diffusion.runtime.errors import first_line
from diffusion.runtime.files import write_json
from diffusion.runtime.lock import Lock


class RunError(Exception):
    """What ends a run and is no bug; the message tells the user what was found and what to do."""


@contextlib.contextmanager
def naming(key):
    """Turn a ValueError within into a RunError that names the part of the config it came from."""
    try:
        yield
    except ValueError as error:
        raise RunError(f'{key}: {error}') from error


@contextlib.contextmanager
def writing(folder, *kinds):
    """Turn an OSError within, or one of `kinds`, into a RunError that names the folder that is written to."""
    try:
        yield
    except (OSError, *kinds) as error:
        raise RunError(
            f'{folder} cannot be written to ({first_line(error)}): make room or mend it, or choose another --workdir'
        ) from error


def make_folder(*path):
    """The path of a folder within a workdir; it is made, and is known to take a file before anything is computed."""
    folder = os.path.join(*path)
    with writing(folder):
        if meshes.is_first():
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b'written')
    return folder


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
    first_level: int = 1  # what its module calls level 1

    def init(self, key):
        """Fresh parameters."""
        return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(key))))

    def net(self, params, *, dropout_key=None):
        """The callable (x_t (B, ...), t (B,)) → (B, ...); with dropout where a key is given."""
        graph, _ = nnx.split(nnx.eval_shape(lambda: self.make(nnx.Rngs(0))))
        module = nnx.merge(graph, params)
        how = {} if dropout_key is None else dict(deterministic=False, rngs=nnx.Rngs(dropout=dropout_key))
        # Our levels are 1 … T; weights trained by others have learned 0 … T−1.
        return lambda x_t, t: module(x_t, t - (1 - self.first_level), **how)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What every mode needs."""

    schedule: schedule.Schedule
    network: Network
    optimizer: optax.GradientTransformation  # for a learning rate of 1
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


# What may be another on each host: which one it is, and where it finds and keeps what is the same.
OF_A_HOST = ('distributed.process_id', 'data.data_dir', 'data.cache_dir', 'compile_cache')
LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax')  # of which others compile other programs, or compute something else


def begin(config, mode):
    """Join the other hosts of the run, before anything touches a device. RunError: they were not asked for the same.

    Alone on a CPU, cores share the images that are drawn.
    """
    with naming('config.distributed'):
        distributed.connect(**config.distributed)
    if mode == 'sample':
        meshes.use_cores(min(config.sample.batch_size, config.sample.num_images))
    if jax.distributed.is_initialized():
        asked = {f'config.{key}': repr(value) for key, value in _flat(config.to_dict()) if key not in OF_A_HOST}
        versions = {f'the version of {name}': importlib.metadata.version(name) for name in LIBRARIES}
        require_same(
            asked | versions | {'--mode': mode}, 'Start all hosts with the same command and the same software.'
        )


def require_same(values, advice):
    """Raise RunError on all hosts where {name: text} is not the same on all of them; they wait for each other."""
    found = meshes.differences(values)
    if found:
        lines = ''.join(f'\n    {name}: {what}' for name, what in found.items())
        raise RunError(
            f'{" and ".join(found)} {"is" if len(found) == 1 else "are"} not the same on all hosts{lines}\n{advice}'
        )


def _flat(tree, path=''):
    """(key with dots, value) of all that nested dicts hold."""
    for key, value in tree.items():
        yield from _flat(value, f'{path}{key}.') if isinstance(value, dict) else [(path + key, value)]


def keep_programs(config, workdir):
    """Compile from here on what is not found among the programs that were compiled before."""
    if config.compile_cache == 'off':
        return
    folder = os.path.join(workdir, 'compiled') if config.compile_cache == 'workdir' else config.compile_cache
    jax.config.update('jax_compilation_cache_dir', os.path.abspath(os.path.expanduser(folder)))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
    compilation_cache.reset_cache()  # else JAX holds to what it found when it first compiled something


def check(config):
    """Raise RunError, which names the key, for a value that it cannot have, before anything is read or built."""
    try:
        rules.check(config)
    except ValueError as error:
        raise RunError(str(error)) from error


def build(config):
    """The Experiment that a config describes. Raises RunError, which names the key, where it describes none."""
    check(config)
    with naming(f'config.schedule ({", ".join(f"{key}={value!r}" for key, value in config.schedule.items())})'):
        noise_schedule = make_schedule(config.schedule)
    with naming('config.model.kind'):
        gaussian.require_signal(noise_schedule, config.model.kind, noise_schedule.T)
    with naming('config.model'):
        network = make_network(config.model, config.data)
        jax.eval_shape(network.init, jax.random.key(0))
    with naming('config.mesh'):
        mesh = meshes.make_mesh(config.mesh.fsdp)
    optimizer, learning_rate = make_optimizer(config.train)
    return Experiment(noise_schedule, network, optimizer, learning_rate, mesh)


def make_schedule(config):
    """The Schedule that config.schedule describes."""
    if config.name not in schedule.SCHEDULES:
        raise ValueError(f'name is {config.name!r}, but must be one of {", ".join(schedule.SCHEDULES)}')
    if config.name == 'cosine':
        return schedule.cosine(config.T, config.offset, config.max_beta)
    return schedule.SCHEDULES[config.name](config.T, config.beta_start, config.beta_end)


def make_network(model, images):
    """The Network that config.model describes, for images of config.data."""

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
            remat=model.remat,
            rngs=rngs,
        )

    return Network(make, model.first_level)


def make_optimizer(config):
    """Adam behind a clipped gradient, for a learning rate of 1, and the learning rate as a function of the steps done.

    Of the steps, not of the updates: those that were skipped count, as in the logs.
    """

    def learning_rate(step):
        return config.learning_rate * jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))

    clip = optax.clip_by_global_norm(config.grad_clip or float('inf'))
    return optax.chain(clip, optax.adam(1.0)), learning_rate


def load_images(config, split='train'):
    """The data.Images of one split that config.data describes."""
    keys = ('image_size', 'channels', 'crop', 'data_dir', 'cache', 'cache_dir', 'max_bad_fraction')
    asked = 'config.data' if split == 'train' else f'config.data, config.likelihood.split={split!r}'
    with naming(asked):
        return data.load(config.data.source, split, **{key: config.data[key] for key in keys})


def load_same_images(config, split='train'):
    """load_images, for all hosts. Raises RunError on all of them where they do not find the same images."""
    images = failure = None
    try:
        images = load_images(config, split)
    except RunError as error:
        failure = error  # which the others have to hear of before this one ends
    found = str(failure) if failure else f'{len(images)} images with SHA-256 {images.record["sha256"]}'
    require_same({'config.data.source': found}, 'Give each host the same images: all of them, and nothing else.')
    if failure:
        raise failure
    return images


def resolve(config, workdir):
    """The config, with what it leaves open (0 in data.image_size, data.channels, model.channels) filled in.

    As in the run that `workdir` holds, if it holds one; else from a look at the pictures, and said.
    """
    check(config)
    config = config.copy_and_resolve_references()
    opened = [part for part in ('image_size', 'channels') if not config.data[part]]
    if not opened and config.model.channels:
        return config
    stored = read_config(workdir)
    if stored:
        try:
            config.data.update({key: stored['data'][key] for key in opened})
            if not config.model.channels:
                config.model.update({key: stored['model'][key] for key in CHOSEN})
        except (KeyError, TypeError) as error:
            raise unreadable(workdir, f'{type(error).__name__}: {error}') from error
        return config
    with naming('config.data'):
        seen = data.survey(config.data.source, crop=config.data.crop, data_dir=config.data.data_dir)
        if not seen.sizes:
            first = ''.join(f'\n    {name!r} {reason}' for name, reason in seen.bad[:5])
            raise ValueError(f'none of the {seen.seen} pictures looked at can be decoded. The first:{first}')
    if not config.data.image_size:
        config.data.image_size = chosen_size(seen.sizes)
    if not config.data.channels:
        config.data.channels = 1 if seen.grey == sum(seen.sizes.values()) else 3
    if not config.model.channels:
        config.model.update(chosen_network(config.data.image_size, seen.count))
    print(
        f'{seen.count} pictures; chosen: data.image_size={config.data.image_size} '
        f'data.channels={config.data.channels} '
        + ' '.join(f'model.{key}={config.model[key]}' for key in CHOSEN).replace(', ', ','),
        flush=True,
    )
    return config


def chosen_size(sizes, most=64):
    """An image size for pictures of these (height, width), a Counter: theirs if it is one, else a power of two.

    At least 99 of 100 pictures are that large; never more than `most`, which a first network can be trained for.
    """
    shorter = np.sort(np.repeat([min(size) for size in sizes], list(sizes.values())))
    one_size = len(sizes) == 1 and len(set(next(iter(sizes)))) == 1 and shorter[0] <= most and shorter[0] % 4 == 0
    return int(shorter[0] if one_size else min(most, 2 ** int(np.log2(shorter[len(shorter) // 100]))))


CHOSEN = ('channels', 'multipliers', 'num_blocks', 'attention_resolutions', 'groups')  # what `chosen_network` answers


def chosen_network(image_size, num_images):
    """config.model for images of a size: halved to 8 pixels or fewer; narrow where there is no accelerator."""
    halvings = max(h for h in range(5) if image_size % 2**h == 0 and (h < 2 or image_size >> (h - 1) > 8))
    sizes = [image_size >> h for h in range(halvings + 1)]
    channels = 32 if jax.default_backend() == 'cpu' else 64 if num_images < 20_000 else 128
    return {
        'channels': channels,
        'multipliers': (1, 2, 2, 4, 4)[: halvings + 1],
        'num_blocks': 2,
        'attention_resolutions': tuple(size for size in sizes if size <= 16)[:1],
        'groups': 8 if channels == 32 else 32,
    }


def open_checkpoints(config, workdir, *, writing=False):
    """The checkpoints of a run; `writing` is for the one process that trains, and has to be able to save them."""
    folder = make_folder(workdir, 'checkpoints') if writing else os.path.join(workdir, 'checkpoints')
    return Checkpoints(folder, keep=config.train.keep_checkpoints, writing=writing)


# What a run is; but where the same images lie, how they are fed, and the precision of arithmetic, may change.
INTERVALS = ('num_steps', 'checkpoint_every', 'keep_checkpoints', 'log_every', 'sample_every')  # change no number
IDENTITY = ('data', 'model', 'schedule')
INCIDENTAL = ('source', 'data_dir', 'cache', 'cache_dir', 'placement', 'max_bad_fraction', 'dtype', 'remat')


# What is read from a config.json, and of its images, where it tells of them.
STORED = {'data': dict, 'model': dict, 'schedule': dict, 'train': dict, 'images': dict, 'changes': list}
STORED_IMAGES = {'count': int, 'fingerprint': str, 'sha256': str, 'channel_means': list}


def read_config(workdir):
    """config.json of the run that `workdir` holds, or None if it holds none."""
    try:
        with open(os.path.join(workdir, 'config.json'), encoding='utf-8') as file:
            stored = json.load(file)
        _require_kinds(stored, {part: kind for part, kind in STORED.items() if part in stored})
        if 'images' in stored:
            _require_kinds(stored['images'], STORED_IMAGES)
            if not all(isinstance(mean, (int, float)) for mean in stored['images']['channel_means']):
                raise ValueError('channel_means are no numbers')
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise unreadable(workdir, error) from error
    return stored


def _require_kinds(found, kinds):
    """Raise ValueError where `found` is no dict that holds values of these kinds."""
    if not isinstance(found, dict):
        raise ValueError(f'{str(found)[:40]!r} stands where keys and values are expected')
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind):
            raise ValueError(f'{key} is {str(found.get(key))[:40]!r}, which is no {kind.__name__}')


def unreadable(workdir, why):
    """The RunError of a config.json that is damaged."""
    path = os.path.join(workdir, 'config.json')
    return RunError(f'{path} cannot be read ({why}): restore it, or choose another --workdir')


def check_config(config, workdir, images=None):
    """Raise RunError where `workdir` holds a run of another network, schedule or data; name the differences.

    images: data.Images; where they are given, they have to be those that the run has been trained on.
    """
    stored = read_config(workdir)
    if stored is None:
        return
    asked = _plain(config)
    differences = [
        f'    config.{part}.{key}: {stored.get(part, {}).get(key)!r} there, {asked[part].get(key)!r} asked'
        for part in IDENTITY
        for key in sorted(asked[part].keys() | stored.get(part, {}).keys())
        if key not in INCIDENTAL and stored.get(part, {}).get(key) != asked[part].get(key)
    ]
    before = stored.get('images', {})
    if images is not None and before and before['sha256'] != images.record['sha256']:
        differences.append(
            f'    the images: {before["count"]}, preprocessed {before["fingerprint"]} there; '
            f'{images.record["count"]}, preprocessed {images.record["fingerprint"]} in {config.data.source}'
        )
    if differences:
        raise RunError(
            f'{workdir} holds another run:\n'
            + '\n'.join(differences)
            + '\nAsk for the same, or choose another --workdir.'
        )


def remember_config(config, workdir, images=None, step=0):
    """Write config.json, by which later runs on this workdir are checked; with what the data.Images are.

    Where `workdir` has one already, what training does otherwise from `step` on is told, and recorded in it.
    """
    stored, asked = read_config(workdir) or {}, _plain(config)
    changes = stored.get('changes', [])
    for part, key in [('seed', None), *(('train', key) for key in asked['train'])]:
        before, now = (c.get(part) if key is None else c.get(part, {}).get(key) for c in (stored, asked))
        if stored and step and before != now:
            name = f'config.{part}' + (f'.{key}' if key else '')
            changes.append({'step': step, 'key': name, 'before': before, 'after': now})
            if key not in INTERVALS:
                print(f'{name} is {now!r} from step {step} on; it was {before!r}', flush=True)
    if images is not None:
        asked['images'] = images.record
    if meshes.is_first():
        write_json(os.path.join(workdir, 'config.json'), asked | ({'changes': changes} if changes else {}))


def _plain(config):
    """The config as JSON would give it back."""
    return json.loads(json.dumps(config.to_dict()))


@contextlib.contextmanager
def hold(workdir):
    """Keep other trainings off `workdir`. Raises RunError where one is under way, or it cannot be written to.

    Yields the Lock, on the first host, and None on others.
    """
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(Lock(workdir)) if meshes.is_first() else None
        except OSError as error:
            raise RunError(f'--workdir={workdir} cannot be used: {error}') from error
        yield held


def digest(params):
    """What tells one set of parameters from another: a SHA-256. Of several hosts, all have to ask."""
    result = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        result.update(meshes.gather(leaf).tobytes())
    return result.hexdigest()


def load_params(exp, config, workdir, weights):
    """(step, params) of the newest checkpoint. Raises RunError where there is none.

    weights: 'ema' or 'raw'.
    """
    if not os.path.isdir(os.path.join(workdir, 'checkpoints')):
        raise RunError(
            f'there is no run in {workdir} (no folder checkpoints/ in it): train one first with --mode=train'
        )
    check_config(config, workdir)
    name = {'ema': 'ema', 'raw': 'params'}[weights]
    with open_checkpoints(config, workdir) as checkpoints, intact():
        found = checkpoints.restore_newest(print, **{name: getattr(exp.abstract_state(), name)})
    if found is None:
        raise RunError(f'there is no complete checkpoint in {workdir}/checkpoints yet: train on with --mode=train')
    step, (params,) = found
    return step, params


@contextlib.contextmanager
def intact():
    """Turn checkpoints that are all damaged into a RunError."""
    try:
        yield
    except DamagedError as error:
        raise RunError(str(error)) from error
