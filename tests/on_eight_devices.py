"""What tests/test_devices.py asks of eight simulated devices: a program that prints what it measured, as JSON.

    python -m tests.on_eight_devices

One process for all of it, as every program that it compiles costs seconds.
"""

import dataclasses
import json
import math
import os
import sys
import time
from unittest import mock

os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=8 '
    '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'  # compile fast, run slowly
)
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import numpy as np
import optax

from configs import cifar10
from diffusion import experiment, generate, train
from diffusion.likelihood.elbo import elbo
from diffusion.loss import loss_at
from diffusion.runtime import mesh as meshes
from diffusion.schedule import timesteps
from tests.hlo import collectives, talks_to_host
from tests.test_train import tiny

STEPS = 20
NETWORK = {
    'train.batch_size': 32,
    'train.num_steps': STEPS,
    'train.learning_rate': 1e-3,
    'data.flip': True,
}


def build(data, fsdp, changes=None):
    """(config, Experiment) on a mesh of data × fsdp devices, which may be fewer than there are."""
    config = tiny(NETWORK | (changes or {}))
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    mesh = (
        meshes.make_mesh(fsdp) if devices.size == jax.device_count() else jax.sharding.Mesh(devices, ('data', 'fsdp'))
    )
    return config, dataclasses.replace(experiment.build(config), mesh=mesh)


def on_first(tree):
    """Bytes of a tree on the first device."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


def whole_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def trained(data, fsdp, changes=None):
    """(what was seen, Experiment, state) of STEPS steps, during which nothing goes to a device unasked."""
    config, exp = build(data, fsdp, changes)
    images = experiment.load_images(config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, exp.abstract_state())
    state = old = jax.jit(exp.init, out_shardings=shardings)(jax.random.key(0))
    held = on_first(state)
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
        'collectives': collectives(step.as_text()),
        'talks_to_host': talks_to_host(step.as_text()),
        'state_bytes': held,
        'state_bytes_after': on_first(state),
        'reused_bytes': step.memory_analysis().alias_size_in_bytes,
        'old_is_gone': all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.ema, old.opt_state))),
        'images_are_split': first[1] is None and first[0].addressable_shards[0].data.shape[0],
    }
    return seen, exp, state


def guard_bites():
    """Whether the guard above would notice an array of the host that is handed to a compiled program."""
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
    return float(np.linalg.norm(np.asarray(one) - other) / np.linalg.norm(other))


def drawn(exp, params):
    """Six images, with the noise of η = 1: a number that the devices cannot share evenly."""
    levels = timesteps(exp.schedule.T, exp.schedule.T)
    draw = generate.make_sampler(exp, params, (8, 8, 1), batch_size=6, timesteps=levels, kind='eps', eta=1.0)
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
    """Losses, parameters, images and bounds on meshes of several shapes, against those on one device."""
    alone, exp, state = trained(1, 1)
    params = jax.tree.map(np.asarray, state.params)  # all that draws below starts from the same ones
    images = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)
    here = {'images': drawn(exp, jax.device_put(params, meshes.replicated(exp.mesh)))}
    here['bound'] = bound(exp, jax.device_put(params, meshes.replicated(exp.mesh)), images)
    found = {'1×1': alone | {'leaves': [leaf.size for leaf in jax.tree.leaves(params)]}}
    accumulated = {'train.accumulate': 4, 'data.placement': 'host'}
    for name, shape in {'8×1': (8, 1), '2×4': (2, 4), '1×8': (1, 8), '8×1, 4 parts': (8, 1, accumulated)}.items():
        seen, exp, state = trained(*shape)
        seen['params'] = {
            jax.tree_util.keystr(path): relative(leaf, mine)
            for (path, leaf), mine in zip(
                jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(params), strict=True
            )
        }
        if name in ('8×1', '2×4'):
            there = jax.device_put(params, meshes.split_state(exp.mesh, params))
            seen['images'] = np.abs(drawn(exp, there) - here['images']).max()
            terms = bound(exp, there, images)
            seen['bound'] = {key: relative(terms[key], value) for key, value in here['bound'].items() if value.size}
        seen['split_leaves'] = [
            leaf.size
            for leaf, sharding in zip(
                jax.tree.leaves(params), jax.tree.leaves(meshes.split_state(exp.mesh, params)), strict=True
            )
            if not sharding.is_fully_replicated
        ]
        found[name] = seen
    return found


def sharded_state():
    """Bytes of the CIFAR-10 network's state on a device with fsdp=8, and of what making a state needs."""
    config = cifar10.get_config()
    config.mesh.fsdp = 8
    exp = experiment.build(config)
    abstract = exp.abstract_state()
    per_device = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)
    )
    _, small = build(1, 8, {'model.channels': 128, 'model.groups': 32})
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
    """A gradient with remat and bfloat16, after two steps: bytes of memory, and how far it is off."""
    key = np.random.default_rng(1)
    coarse = np.tanh(key.normal(size=(16, 4, 4, 3))).repeat(4, axis=1).repeat(4, axis=2).astype(np.float32)
    t, eps = key.integers(1, 1001, 16), key.normal(size=coarse.shape).astype(np.float32)

    def compiled(**changes):
        model = {'multipliers': (1, 2), 'dropout': 0.5} | changes
        config = tiny({f'model.{key}': value for key, value in model.items()})
        config.data.update(image_size=16, channels=3)
        config.schedule.update(T=1000, beta_start=1e-4, beta_end=0.02)
        exp = experiment.build(config)

        def mean_loss(params, key, eps):
            net = exp.network.net(params, dropout_key=key)
            return loss_at(exp.schedule, net, coarse, t, eps, kind='eps', weighting='simple').mean()

        program = jax.jit(jax.grad(mean_loss)).lower(exp.abstract_state().params, jax.random.key(0), eps).compile()
        return exp, program

    exp, plain = compiled()
    optimizer = optax.adam(2e-3)
    params = jax.jit(exp.network.init)(jax.random.key(0))
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def updated(params, state, gradient):
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    for step in range(2):  # as the last convolutions start at zero, most parameters have no gradient before
        gradient = plain(params, jax.random.key(step), key.normal(size=eps.shape).astype(np.float32))
        params, state = updated(params, state, gradient)
    programs = {'plain': plain, 'remat': compiled(remat=True)[1]}
    programs['both'] = compiled(remat=True, dtype='bfloat16')[1]
    gradients = {name: program(params, jax.random.key(0), eps) for name, program in programs.items()}
    gradients['other dropout'] = plain(params, jax.random.key(1), eps)
    flat = {name: np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for name, g in gradients.items()}
    return {
        'temp': {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()},
        'off': {name: relative(gradient, flat['plain']) for name, gradient in flat.items()},
    }


def properties():
    """meshes.put, put_whole, gather, mean_over_parts, fits, on eight devices."""
    mesh = meshes.make_mesh(2)
    split, x = meshes.split_batch(mesh), np.arange(64 * 3, dtype=np.int32).reshape(64, 3)

    def found_in(params, key, part):
        return {'product': params * part.astype(np.float32).mean(0), 'drawn': jax.random.uniform(key, 1000)}

    parts = jax.jit(lambda key, x: meshes.mean_over_parts(mesh, found_in, np.float32(2), key, [x], 4))
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
    meshes.FEWEST_TO_SPLIT = 24  # the network is tiny, and so are its arrays
    asked = sys.argv[1:] or ['agreement', 'sharded_state', 'economies', 'properties', 'guard_bites', 'callback_is_seen']
    result = {'seconds': {}, 'fewest_to_split': meshes.FEWEST_TO_SPLIT}
    for name in asked:
        started = time.perf_counter()
        result[name] = globals()[name]()
        result['seconds'][name] = time.perf_counter() - started
    json.dump(result, sys.stdout, default=float)
