"""Measurements on eight simulated devices for tests/test_devices.py, printed as JSON.

    python -m tests.on_eight_devices quick|tiny [MEASUREMENT …]

All measurements share one process, because starting it and compiling its programs take seconds. The network is that of
`tests.runs.quick` or `tests.runs.tiny`, in the plain implementation, which accelerators use, unless the name of a
measurement states another.
"""

import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from unittest import mock

from tests.xla_flags import FAST_TO_COMPILE

os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count=8 {FAST_TO_COMPILE}'
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import build
from diffusion.configs import cifar10
from diffusion.likelihood.elbo import elbo
from diffusion.loss import WEIGHTINGS
from diffusion.metrics import tables
from diffusion.modes import evaluate, reference, train
from diffusion.modes.sample import make_sampler
from diffusion.networks import plain
from diffusion.runtime import mesh as meshes
from diffusion.schedule import timesteps
from tests import runs
from tests.hlo import collectives, talks_to_host
from tests.runs import tiny

NETWORK = sys.argv[1]
STEPS = 10
SETTINGS = {
    'train.batch_size': 32,
    'train.num_steps': STEPS,
    'train.learning_rate': 3e-3,
    'data.flip': True,
    'model.implementation': 'plain',
}
RUNS = {
    '8×1': (8, 1, {}),
    '2×4': (2, 4, {}),
    '1×8': (1, 8, {}),
    '8×1, 4 parts': (8, 1, {'train.accumulate': 4, 'data.placement': 'host'}),
    '8×1, for CPUs': (8, 1, {'model.implementation': 'cpu'}),
}


def make(data, fsdp, changes=None):
    """(config, Experiment) on a mesh of data × fsdp devices, which may be fewer than there are."""
    config = getattr(runs, NETWORK)(SETTINGS | (changes or {}))
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    mesh = (
        meshes.make_mesh(fsdp) if devices.size == jax.device_count() else jax.sharding.Mesh(devices, ('data', 'fsdp'))
    )
    return config, dataclasses.replace(build.build(config), mesh=mesh)


def on_first(tree):
    """Bytes of a tree on the first device."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


def whole_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def host(tree):
    return jax.tree.map(np.asarray, tree)


def put(exp, tree):
    """A state or a part of it, from the host, on the devices that are to hold it."""
    return jax.tree.map(meshes.put_whole, tree, meshes.split_state(exp.mesh, tree))


def trained(config, exp, state):
    """(measurements, state) of STEPS steps, during which nothing goes to a device unasked."""
    images = build.load_images(config)
    held, old = on_first(state), state
    batches = train.feed(config, exp, images, 0)
    first = next(batches)
    step = train.compile_step(config, exp, state, *first)
    losses = []
    with jax.transfer_guard('disallow'):
        for batch in [first, *batches]:
            state, metrics = step(state, *batch)
            losses.append(metrics['loss'])
    seen = {
        'losses': [float(loss) for loss in losses],
        'collectives': collectives(step.compiled.as_text()),
        'talks_to_host': talks_to_host(step.compiled.as_text()),
        'state_bytes': held,
        'state_bytes_after': on_first(state),
        'reused_bytes': step.compiled.memory_analysis().alias_size_in_bytes,
        'old_is_gone': all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.ema, old.opt_state))),
        'images_are_split': first[1] is None and first[0].addressable_shards[0].data.shape[0],
    }
    return seen, state


def guard_bites():
    """Whether the guard above notices an array of the host that is handed to a compiled program."""
    program = jax.jit(lambda x: x + 1).lower(np.zeros(3, np.float32)).compile()
    try:
        with jax.transfer_guard('disallow'):
            program(np.zeros(3, np.float32))
    except Exception as error:
        return 'isallowed' in str(error)
    return False


def callback_is_seen():
    """Whether `talks_to_host` finds a callback."""
    program = jax.jit(lambda x: (jax.debug.callback(print, x), x)[1]).lower(np.zeros(3, np.float32)).compile()
    return talks_to_host(program.as_text())


def relative(one, other):
    """‖one − other‖ / ‖other‖, 0 of 0 being 0."""
    if not np.any(one) and not np.any(other):
        return 0.0
    return float(np.linalg.norm(np.asarray(one) - other) / np.linalg.norm(other))


def relative_leaves(tree, other):
    """{path of an array: how far it is off}."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True)
    return {jax.tree_util.keystr(path): relative(leaf, theirs) for (path, leaf), theirs in pairs}


def drawn(exp, params):
    """Six images, with the noise of η = 1: a number that the devices cannot share evenly."""
    levels = timesteps(exp.schedule.T, exp.schedule.T)
    draw = make_sampler(exp, params, (8, 8, 1), batch_size=6, timesteps=levels, kind='eps', eta=1.0)
    return draw(params, 3, 0, 6)


def bound(exp, params, images):
    """The terms of the ELBO of eight images, as --mode=likelihood splits and computes them."""
    program = jax.jit(
        lambda key, params, x0: elbo(
            key, exp.schedule, exp.network.net(meshes.whole(exp.mesh, params)), x0, kind='eps'
        ),
        out_shardings=meshes.replicated(exp.mesh),
    )
    with jax.default_matmul_precision('highest'):
        terms = program(jax.random.key(5), params, meshes.put_whole(images, meshes.split_batch(exp.mesh)))
    return {name: np.asarray(value) for name, value in terms._asdict().items()}


def agreement():
    """Losses, parameters, images and bounds on meshes of several shapes, compared with those on one device."""
    config, exp = make(1, 1)
    first = host(exp.initial_state(jax.random.key(0)))
    alone, state = trained(config, exp, put(exp, first))
    params = host(state.params)  # all that draws below starts from the same ones
    images = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)
    here = {'images': drawn(exp, put(exp, params)), 'bound': bound(exp, put(exp, params), images)}
    paths = jax.tree_util.tree_leaves_with_path(params)
    found = {'1×1': alone | {'leaves': {jax.tree_util.keystr(path): leaf.size for path, leaf in paths}}}
    for name, (data, fsdp, changes) in RUNS.items():
        config, exp = make(data, fsdp, changes)
        state = exp.initial_state(jax.random.key(0)) if name == '2×4' else put(exp, first)
        begun = relative_leaves(state.params, first.params)
        seen, state = trained(config, exp, state)
        seen['initial'] = max(begun.values())
        seen['params'] = relative_leaves(state.params, params)
        if name in ('8×1', '2×4'):
            there = put(exp, params)
            seen['images'] = np.abs(drawn(exp, there) - here['images']).max()
            terms = bound(exp, there, images)
            seen['bound'] = {key: relative(terms[key], value) for key, value in here['bound'].items() if value.size}
        shardings = meshes.split_state(exp.mesh, params)
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
        seen['split_leaves'] = [leaf.size for leaf, sharding in leaves if not sharding.is_fully_replicated]
        found[name] = seen
    return found


def sharded_state():
    """Bytes of the CIFAR-10 network's state on a device with fsdp=8, and of what making a state needs."""
    config = cifar10.get_config()
    config.mesh.fsdp = 8
    abstract = build.build(config).abstract_state()
    per_device = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)
    )
    _, small = make(1, 8, {'model.channels': 128, 'model.groups': 32})
    state = small.abstract_state()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    memory = jax.jit(small.init, out_shardings=shardings).lower(jax.random.key(0)).compile().memory_analysis()
    return {
        'whole': whole_bytes(abstract),
        'per_device': per_device,
        'init_whole': whole_bytes(state),
        'init_output': memory.output_size_in_bytes,
        'init_temp': memory.temp_size_in_bytes,
    }


def economies():
    """A gradient with remat and bfloat16: bytes of memory, and how far it is off.

    XLA:CPU would undo the remat of the plain network, as it merges equal operations. Therefore its memory is that of
    the values which the backward pass is given; that of the network for CPUs is a compiled program's.
    """
    random = np.random.default_rng(1)
    coarse = np.tanh(random.normal(size=(16, 4, 4, 3))).repeat(4, axis=1).repeat(4, axis=2).astype(np.float32)
    t, eps = random.integers(1, 1001, 16), random.normal(size=coarse.shape).astype(np.float32)

    def make_loss(**changes):
        model = {'multipliers': (1, 2), 'dropout': 0.5} | changes
        config = tiny({f'model.{key}': value for key, value in model.items()})
        config.data.update(image_size=16, channels=3)
        config.schedule.update(T=1000, beta_start=1e-4, beta_end=0.02)
        exp = build.build(config)

        def mean_loss(params, key, eps):
            net = exp.network.net(params, dropout_key=key)
            return WEIGHTINGS['simple'].loss(exp.schedule, net, coarse, t, eps, 'eps').mean()

        return exp, mean_loss

    def bytes_kept(**changes):
        exp, mean_loss = make_loss(implementation='plain', **changes)
        backward = jax.eval_shape(
            lambda params: jax.vjp(lambda params: mean_loss(params, jax.random.key(0), eps), params)[1],
            exp.abstract_state().params,
        )
        return whole_bytes(backward)

    def compiled(**changes):
        exp, mean_loss = make_loss(implementation='cpu', **changes)
        gradient = jax.jit(jax.grad(mean_loss))
        return gradient.lower(exp.abstract_state().params, jax.random.key(0), eps).compile()

    variants = {'neither': {}, 'remat': {'remat': True}, 'both': {'remat': True, 'dtype': 'bfloat16'}}
    programs = {name: compiled(**changes) for name, changes in variants.items()}
    initial_params = jax.jit(make_loss(implementation='cpu')[0].network.init)(jax.random.key(0))
    # The last convolutions start at zero, so that most initial parameters have no gradient.
    params = jax.tree.map(lambda leaf: leaf + random.normal(0, 0.02, leaf.shape).astype(np.float32), initial_params)
    gradients = {name: program(params, jax.random.key(0), eps) for name, program in programs.items()}
    gradients['other dropout'] = programs['neither'](params, jax.random.key(1), eps)
    flat = {name: np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for name, g in gradients.items()}
    return {
        'kept': {name: bytes_kept(**changes) for name, changes in variants.items()},
        'temp': {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()},
        'off': {name: relative(gradient, flat['neither']) for name, gradient in flat.items()},
    }


def evaluation():
    """Metrics by a network and of raw pixels, of 101 digits in batches of 30, on one device and on meshes of eight."""
    extract = tables.Features(
        extract=lambda params, images, dialect: {'mixed': jnp.tanh(images.reshape(len(images), -1) @ params)},
        dialects=('whole',),
        sizes={'mixed': 16},
    )
    metrics = {
        f'{name}-mixed': tables.METRICS[f'{name}-pixels']._replace(features='mixed', output='mixed')
        for name in ('FD', 'KD', 'recall')
    }
    params = np.random.default_rng(0).normal(0, 0.01, (64, 16)).astype(np.float32)
    networks = [reference.Network('mixed', 'whole', params, 'of its weights')]
    networks += [reference.Network('pixels', '[-1,1]', None, None)]
    images = build.load_images(tiny({'data.split': 'test'}))[:101]
    found = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(tables.FEATURES, {'mixed': extract}),
        mock.patch.dict(tables.METRICS, metrics),
    ):
        for name, shape in {'1×1': (1, 1), '8×1': (8, 1), '2×4': (2, 4)}.items():
            asked = {'sample.metrics': (*metrics, 'FD-pixels'), 'metrics.batch_size': 30}
            config, exp = make(*shape, asked | {'data.cache_dir': os.path.join(folder, name)})
            plan = evaluate.Plan(networks, {}, {}, {})
            measured = evaluate.measure(config, plan, images, len(images), exp.mesh, None, folder)
            found[name] = {entry['name']: [entry['value'], entry['standard_error']] for entry in measured['metrics']}
    return found


def properties():
    """meshes.put, put_whole, gather, mean_over_parts, fits, on eight devices."""
    mesh = meshes.make_mesh(2)
    split, x = meshes.split_batch(mesh), np.arange(64 * 3, dtype=np.int32).reshape(64, 3)

    def found_in(params, key, part):
        return {'product': params * part.astype(np.float32).mean(0), 'drawn': jax.random.uniform(key, 1000)}

    parts = jax.jit(lambda key, x: meshes.mean_over_parts(mesh, found_in, np.float32(2), key, [x], 4, fold=plain.fold))
    mean, program = parts(jax.random.key(0), meshes.put(x, split)), parts.lower(jax.random.key(0), meshes.put(x, split))
    tree = {'a': np.ones((1024, 3), np.float32), 'b': np.ones(4, np.float32)}
    one_whole = jax.jit(lambda tree: meshes.whole(mesh, tree))(jax.device_put(tree, meshes.split_state(mesh, tree)))
    back = jax.jit(lambda tree: meshes.like_state(mesh, tree))(one_whole)
    with mock.patch.object(jax, 'devices', lambda: list(mesh.devices.flat)[::-1]):
        order = [device.id for device in meshes.make_mesh(2).devices.flat]
    return {
        'order': order,
        'put': [meshes.put(x, s).addressable_shards[0].data.shape for s in (split, meshes.replicated(mesh))],
        'gathered': all(bool((meshes.gather(put(x, split)) == x).all()) for put in (meshes.put, meshes.put_whole)),
        'mean_over_parts': (mean['product'] / 2 - x.mean(0)).tolist(),
        'spread_of_draws': mean['drawn'].std(),
        'sent': collectives(program.compile().as_text()),
        'whole': {key: leaf.addressable_shards[0].data.shape for key, leaf in one_whole.items()},
        'like_state': {key: leaf.addressable_shards[0].data.shape for key, leaf in back.items()},
    }


if __name__ == '__main__':
    meshes.MIN_SIZE_TO_SPLIT = 24  # the network is tiny, and so are its arrays
    everything = [agreement, sharded_state, evaluation, properties, guard_bites, callback_is_seen]
    asked = sys.argv[2:] or [function.__name__ for function in everything]
    result = {'seconds': {}, 'smallest_to_split': meshes.MIN_SIZE_TO_SPLIT}
    for name in asked:
        started = time.perf_counter()
        result[name] = globals()[name]()
        result['seconds'][name] = time.perf_counter() - started
    json.dump(result, sys.stdout, default=float)
