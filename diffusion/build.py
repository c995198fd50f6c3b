"""From a config to the objects that it describes: schedule, network, optimizer, mesh, images, TrainState."""

import dataclasses
import functools
import importlib.metadata
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from diffusion import autoconfig, data, gaussian, schedule, workdir
from diffusion.data.pictures import Preprocessing
from diffusion.loss import WEIGHTINGS, History, init_history
from diffusion.networks import IMPLEMENTATIONS, NETWORKS, make_rngs, round_parameters
from diffusion.runtime import devices as runtime_devices
from diffusion.runtime import hosts, mesh
from diffusion.util import RunError, naming, say, signature, warn

Result = TypeVar('Result')

SAME_IMAGES = 'Give each host the same images: all of them, and nothing else.'

# What may differ between the hosts of a run: the host's number, and where it finds and keeps files.
PER_HOST = (
    'distributed.process_id',
    'data.data_dir',
    'data.cache_dir',
    'compile_cache',
    'command.config',
    'command.overrides',
)
LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax')  # other versions compile other programs, or compute something else


class Skipped(NamedTuple):
    """Steps that changed nothing because their loss or gradient was not finite."""

    total: jax.Array  # () int32
    in_a_row: jax.Array  # () int32, up to now


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes. It holds no random keys: they follow from (seed, step)."""

    step: jax.Array  # () int32, steps done, skipped ones included
    params: Any
    ema: Any  # exponential moving average of params
    opt_state: Any
    skipped: Skipped
    history: History | None = None  # of losses, if levels are drawn by them

    def trees(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the step."""
        trees = {'params': self.params, 'ema': self.ema, 'opt_state': self.opt_state, 'skipped': self.skipped}
        return trees if self.history is None else trees | {'history': self.history}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network without its parameters, which are a plain dict of arrays."""

    make: Callable[[nnx.Rngs], nnx.Module]
    first_level: int = 1  # the t with which the module is called at level 1
    num_classes: int = 0  # 0: unconditional
    learns_variance: bool = False  # twice as many outputs, see `gaussian.evaluate_learned`
    level_scale: float = 1.0  # by which t is multiplied before the module is called

    @functools.cached_property
    def graph(self) -> nnx.GraphDef:
        """The structure of the module. Raises ValueError if the module refuses its arguments."""
        return nnx.split(nnx.eval_shape(lambda: self.make(make_rngs(default=0))))[0]

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Return initial parameters."""
        return nnx.to_pure_dict(nnx.state(self.make(make_rngs(default=key))))

    def net(
        self, params: dict[str, Any], labels: jax.Array | None = None, *, dropout_key: jax.Array | None = None
    ) -> Callable:
        """Close the network over its parameters, and over the classes of a batch of images.

        Args:
            params: a dict of arrays, of the structure that `init` returns.
            labels: (B,) int32, for a conditional network; −1 is no class. None is no class for all images.
            dropout_key: typed PRNG key; None for no dropout.

        Returns:
            The callable (x_t (B, H, W, C), t (B,)) → (B, H, W, C), or 2C if it learns the variance.
        """
        module = nnx.merge(self.graph, params)
        if dropout_key is None:
            round_parameters(module)
        mode = {} if dropout_key is None else dict(deterministic=False, rngs=make_rngs(dropout=dropout_key))
        # Our levels are 1 … T; weights of other projects were trained with 0 … T−1.
        given = () if labels is None else (labels,)
        scale = 1 if self.level_scale == 1 else self.level_scale  # whole levels stay whole numbers
        return lambda x_t, t: module(x_t, (t - (1 - self.first_level)) * scale, *given, **mode)

    def for_variance(self, net: Callable, variance: Any) -> Callable:
        """Return a `net` of this network as samplers and likelihoods of this variance take it."""
        return gaussian.mean_half(net) if self.learns_variance and not gaussian.is_learned(variance) else net

    def require_variance(self, variance: str) -> None:
        """Raise ValueError if a variance is 'learned', but not by this network."""
        if variance == 'learned' and not self.learns_variance:
            raise ValueError(
                "variance is 'learned', but the model has model.variance='fixed': use variance 'small' or 'large', or "
                'train with --config.model.variance=learned'
            )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What every mode needs."""

    schedule: schedule.Schedule
    network: Network
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule  # number of updates → learning rate, for the logs
    mesh: jax.sharding.Mesh
    implementation: types.ModuleType  # an entry of networks.IMPLEMENTATIONS
    by_history: bool = False  # whether training draws levels by their losses in earlier steps

    def init(self, key: jax.Array) -> TrainState:
        """Return the TrainState at step 0, where the EMA equals the parameters."""
        params = self.network.init(key)
        return self.start(params, jax.tree.map(jnp.copy, params))  # one buffer cannot be donated twice

    def initial_state(self, key: jax.Array) -> TrainState:
        """Return `init(key)`, compiled and on the devices of the mesh."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        init = self.implementation.compile(self.init, key, out_shardings=shardings, once=True)
        return jax.block_until_ready(init(key))  # raises if memory ran out

    def start(self, params: Any, ema: Any) -> TrainState:
        """Return the TrainState at step 0 with these weights."""
        skipped = Skipped(jnp.int32(0), jnp.int32(0))
        return TrainState(jnp.int32(0), params, ema, self.optimizer.init(params), skipped, self.init_history())

    def init_history(self) -> History | None:
        """Return the history of losses at step 0, or None if training keeps none."""
        return init_history(self.schedule.T) if self.by_history else None

    def abstract_state(self, *, packed: bool = False) -> TrainState:
        """Return the shapes and shardings of the TrainState."""
        state = jax.eval_shape(lambda key: self._pack(self.init(key)) if packed else self.init(key), jax.random.key(0))
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            mesh.split_state(self.mesh, state),
        )

    def packed(self, state: TrainState) -> TrainState:
        """Return a TrainState in the form that the implementation's training steps are fastest with."""
        return self._convert(self._pack, state)

    def unpacked(self, state: TrainState) -> TrainState:
        """Return a TrainState as trees of named arrays, from its packed form."""
        return self._convert(self.implementation.unpack, state)

    def _pack(self, state):
        return self.implementation.pack(state, state.params, self.mesh.shape['fsdp'])

    def _convert(self, function, state):
        new = jax.eval_shape(function, state)
        if _structure(new) == _structure(state):
            return state
        return jax.jit(function, out_shardings=mesh.split_state(self.mesh, new))(state)


def build(config: ConfigDict, devices: Sequence[Any] | None = None) -> Experiment:
    """Build the Experiment that a config describes.

    Args:
        config: the whole config.
        devices: other devices than those of this run, for which programs are compiled but not run.

    Raises:
        RunError: a value is not allowed, or values do not fit together; the message names the key.
    """
    workdir.check(config)
    with naming(f'config.schedule ({", ".join(f"{key}={value!r}" for key, value in config.schedule.items())})'):
        noise_schedule = make_schedule(config.schedule)
    with naming('config.model.kind'):
        gaussian.require_signal(noise_schedule, config.model.kind, noise_schedule.T)
    with naming('config.mesh'):
        device_mesh = mesh.make_mesh(config.mesh.fsdp, devices)
    implementation = IMPLEMENTATIONS[_implementation(config.model.implementation, device_mesh)]
    with naming('config.model'):
        require_classes(config)
        require_outputs(config)
        network = make_network(config, NETWORKS | implementation.NETWORKS)
        _ = network.graph  # raises ValueError now
    optimizer, learning_rate = make_optimizer(config.train)
    if warning := schedule.start_warning(noise_schedule, noise_schedule.T):
        remedy = 'larger β (schedule.beta_end), more levels (schedule.T), or schedule.name=cosine'
        say(f'warning: config.schedule: {warning}; train with {remedy}')
    _warn_of_ignored(config)
    by_history = WEIGHTINGS[config.train.loss].by_history
    return Experiment(noise_schedule, network, optimizer, learning_rate, device_mesh, implementation, by_history)


def _warn_of_ignored(config):
    """Warn of keys of the command line that the network or the schedule does not take, but another one would."""
    chosen: dict[str, tuple[dict[str, Any], str]] = {
        'model': (NETWORKS, config.model.network),
        'schedule': (schedule.SCHEDULES, config.schedule.name),
    }
    for key in config.command.overrides:
        group, _, name = key.partition('.')
        table, used = chosen.get(group, ({}, ''))
        able = _entries_with(name, table)
        if able and used not in able:
            say(f'warning: config.{key} has no effect on {used!r}, only on {", ".join(able)}')


def make_schedule(config: ConfigDict) -> schedule.Schedule:
    """Build the noise schedule from config.schedule.

    Raises:
        ValueError: the schedule does not exist for these values.
    """
    found = _call(schedule.SCHEDULES[config.name], config)
    return schedule.with_zero_terminal_snr(found) if config.zero_terminal_snr else found


def make_network(config: ConfigDict, networks: dict[str, Callable]) -> Network:
    """Build the network that config.model describes, for images of config.data.

    Args:
        config: the whole config.
        networks: {name: class}, such as `networks.NETWORKS`.

    Returns:
        The network. It checks its arguments when its graph is made.
    """
    given = {
        **config.model,
        'image_size': config.data.image_size,
        'image_channels': config.data.channels,
        'out_channels': config.data.channels * (2 if config.model.variance == 'learned' else 1),
        'dtype': jnp.dtype(config.model.dtype),
    }
    return Network(
        lambda rngs: _call(networks[config.model.network], given | {'rngs': rngs}),
        config.model.first_level,
        config.model.num_classes,
        config.model.variance == 'learned',
        config.model.level_scale,
    )


def require_classes(config: ConfigDict) -> None:
    """Raise ValueError unless model.num_classes fits data.labels and the network."""
    model = config.model
    if model.num_classes and not config.data.labels:
        raise ValueError(
            f'num_classes is {model.num_classes}, but data.labels=False trains without classes: use data.labels=True, '
            'or num_classes=0'
        )
    if config.data.labels and not model.num_classes:
        raise ValueError('num_classes is 0, but data.labels=True: give the number of classes, or use data.labels=False')
    able = _entries_with('num_classes', NETWORKS)
    if model.num_classes and model.network not in able:
        raise ValueError(
            f'network is {model.network!r}, which takes no num_classes, but data.labels=True: use one of '
            f'{", ".join(able)}, or data.labels=False'
        )


def require_outputs(config: ConfigDict) -> None:
    """Raise ValueError if model.variance is learned, but the network has no outputs for it."""
    model = config.model
    able = _entries_with('out_channels', NETWORKS)
    if model.variance == 'learned' and model.network not in able:
        raise ValueError(
            f"variance is 'learned', but network is {model.network!r}, which takes no out_channels: use one of "
            f'{", ".join(able)}, or variance=fixed'
        )


def _entries_with(argument: str, table: dict[str, Any]) -> list[str]:
    """The names of the entries that take an argument."""
    return [name for name, entry in table.items() if argument in signature(entry).parameters]


def make_optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Build the optimizer: Adam with gradient clipping and a linear warm-up.

    Args:
        config: config.train.

    Returns:
        The optimizer, and its learning rate as a function of the number of updates. A skipped step is not an update.
    """

    def learning_rate(updates):
        done = jnp.asarray(updates + 1, jnp.float32)
        return config.learning_rate * jnp.minimum(1.0, done / max(1, config.warmup_steps))

    clip = optax.clip_by_global_norm(config.grad_clip or float('inf'))
    return optax.chain(clip, optax.adam(learning_rate)), learning_rate


def load_images(config: ConfigDict, split: str = '', key: str = '', labelled: bool = False) -> data.Images:
    """Load one split of the images that config.data describes.

    Args:
        config: the whole config.
        split: '' is config.data.split, the training images.
        key: the key of the config that names the split, for errors.
        labelled: whether all images must have one of config.model.num_classes classes.

    Returns:
        The images, uint8 (N, image_size, image_size, channels).

    Raises:
        RunError: there are no such images.
    """
    keys = ('image_size', 'channels', 'crop', 'data_dir', 'cache', 'cache_dir', 'max_bad_fraction', 'max_pixels')
    asked = f'config.{key}={split!r}' if key else f'config.data, split {split!r}' if split else 'config.data'
    num_shards: int | Callable[[int], int] = 1
    if split in ('', config.data.split):  # only what is trained on is divided
        num_shards = config.data.shards or functools.partial(autoconfig.choose_shards, config)
    with naming(asked):
        arguments = {key: config.data[key] for key in keys} | {'num_shards': num_shards}
        images = data.load(config.data.source, split or config.data.split, **arguments)
        return data.labelled(images, config.model.num_classes) if labelled else images


def load_same_images(config: ConfigDict, split: str = '', key: str = '', labelled: bool = False) -> data.Images:
    """Load one split of the images on all hosts, and check that all hosts have the same images.

    Args:
        config: the whole config.
        split: as in `load_images`.
        key: as in `load_images`.
        labelled: as in `load_images`.

    Returns:
        The images, as in `load_images`.

    Raises:
        RunError: the images differ, or a host has none; raised on all hosts.
    """
    images = _on_all_hosts(lambda: load_images(config, split, key, labelled))
    require_same({'config.data.source': _digests(images.record)}, SAME_IMAGES)
    return images


def load_training_images(config: ConfigDict) -> data.Images:
    """Load the images that this host trains on: all of them, or its own shards.

    In the second case the hosts compare the names and sizes of all pictures, before any is decoded.

    Args:
        config: the whole config. If it leaves data.shards open, the number is chosen, see `Images.num_shards`.

    Returns:
        The images of this host, with labels if config.data.labels. Their record is that of the images of all hosts.

    Raises:
        RunError: the images differ, or a host cannot load its own; raised on all hosts.
    """
    asked, count = config.data, jax.process_count()

    def open_pictures():
        with naming('config.data'):
            preprocess = Preprocessing(asked.crop, asked.image_size, asked.channels)
            return data.open_pictures(asked.source, asked.split, asked.data_dir, asked.max_pixels), preprocess

    def decode():
        how = {key: asked[key] for key in ('cache', 'cache_dir', 'max_bad_fraction')}
        with naming('config.data'):
            shards = of_host[jax.process_index()]
            images = data.decode(pictures, preprocess, **how, num_shards=num_shards, shards=shards)
            return data.labelled(images, config.model.num_classes) if asked.labels else images

    pictures, preprocess = _on_all_hosts(open_pictures)
    num_shards = asked.shards or autoconfig.choose_shards(config, len(pictures))
    compared = {'config.data.shards': str(num_shards)}
    if num_shards > 1:
        found = f'{len(pictures)} pictures whose names and sizes have SHA-256 {pictures.sha256_everywhere}'
        compared |= {'config.data.source': found, 'the preprocessing': str(preprocess.record())}
    require_same(compared, SAME_IMAGES)
    if num_shards > 1 and not asked.shards:
        say(f'{len(pictures)} pictures; chosen: data.shards={num_shards}')
    of_host = [data.own_shards(num_shards, host, count) for host in range(count)]
    images = _on_all_hosts(decode)
    if num_shards == 1:
        require_same({'config.data.source': _digests(images.record)}, SAME_IMAGES)
        return images
    record = data.join_records(_one_of_each(of_host, hosts.gather([shard.record for shard in images.shards])))
    with naming('config.data'):
        data.require_usable(record['count'], len(pictures), asked.max_bad_fraction)
    return dataclasses.replace(images, record=record)


def _one_of_each(shards: Sequence[Sequence[int]], records: Sequence[Sequence[dict]]) -> list[dict]:
    """Return the record of each shard, from the shards of each host and their records.

    Raises:
        RunError: hosts that have a shard in common decoded different images.
    """
    found: dict[int, tuple[int, dict]] = {}
    for host, (numbers, of_host) in enumerate(zip(shards, records, strict=True)):
        for number, record in zip(numbers, of_host, strict=True):
            first, known = found.setdefault(number, (host, record))
            if _digests(known) != _digests(record):
                raise RunError(
                    f'config.data.source is not the same on all hosts\n    shard {number}: process {first} has '
                    f'{_digests(known)}, process {host} has {_digests(record)}\n{SAME_IMAGES}'
                )
    return [found[number][1] for number in sorted(found)]


def _digests(record: dict[str, Any]) -> str:
    """Return the number of images and the digests in their record, for messages."""
    labels = f' and their labels with {record["labels_sha256"]}' if 'labels_sha256' in record else ''
    return f'{record["count"]} images with SHA-256 {record["sha256"]}{labels}'


def _on_all_hosts(function: Callable[[], Result]) -> Result:
    """Call a function on each host. If it raises RunError on one, raise RunError on all."""
    failure = result = None
    try:
        result = function()
    except RunError as error:
        failure = error
    failures = hosts.gather(failure and str(failure))
    if failure and len(set(failures)) == 1:
        raise failure
    for i, reason in enumerate(failures):
        if reason:
            raise RunError(f'process {i}: {reason}')
    return result  # type: ignore[return-value]


def join_hosts(config: ConfigDict, mode: str) -> None:
    """Join the other hosts of the run, before anything uses a device, and check that all have the same command.

    It starts the devices, prints them, and warns of those that JAX cannot use. On a single CPU host, the modes that
    draw or measure images make each core a device, so that the cores share a batch.

    Args:
        config: the whole config.
        mode: the name of the mode.

    Raises:
        RunError: the settings do not fit together, there is no device, or the hosts differ in settings, versions or
            mode.
        NotMetError: the hosts do not find each other.
    """
    with naming('config.distributed'):
        hosts.connect(**config.distributed)
    if mode in ('sample', 'sweep'):
        mesh.use_cores(min(config.sample.batch_size, config.sample.num_images))
    if mode in ('evaluate', 'reference'):
        mesh.use_cores(config.metrics.batch_size)
    say(f'devices: {runtime_devices.start()}')
    if warning := runtime_devices.unused():
        warn(warning)
    if jax.distributed.is_initialized():
        asked = {f'config.{key}': repr(value) for key, value in _flat(config.to_dict()) if key not in PER_HOST}
        versions = {f'the version of {name}': importlib.metadata.version(name) for name in LIBRARIES}
        advice = 'Start all hosts with the same command and the same software.'
        require_same(asked | versions | {'--mode': mode}, advice)


def require_same(values: dict[str, str], advice: str) -> None:
    """Check that values are the same on all hosts. All hosts must call it, and wait for each other.

    Args:
        values: {name: text}.
        advice: what the user can do if they differ; the last line of the message.

    Raises:
        RunError: a value differs; raised on all hosts.
    """
    found = hosts.differences(values)
    if found:
        lines = ''.join(f'\n    {name}: {difference}' for name, difference in found.items())
        verb = 'is' if len(found) == 1 else 'are'
        raise RunError(f'{" and ".join(found)} {verb} not the same on all hosts{lines}\n{advice}')


def _implementation(name, device_mesh):
    """Resolve 'auto': the implementation for the platform of the devices if there is one, else the plain one."""
    platform = device_mesh.devices.flat[0].platform
    return (platform if platform in IMPLEMENTATIONS else 'plain') if name == 'auto' else name


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def _call(function, values):
    """Call a function or a class with the values that it has parameters for."""
    return function(**{name: values[name] for name in signature(function).parameters if name in values})


def _flat(tree, path=''):
    """Yield (dotted key, value) for each leaf of nested dicts."""
    for key, value in tree.items():
        yield from _flat(value, f'{path}{key}.') if isinstance(value, dict) else [(path + key, value)]
