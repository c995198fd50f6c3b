"""The implementations compute what the plain network computes: outputs, gradients and forward derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.configs import digits
from diffusion.networks import IMPLEMENTATIONS, NETWORKS, cpu, make_rngs
from diffusion.networks.cpu import unet as cpu_unet
from tests.jaxprs import equations
from tests.xla_flags import QUICK

DEMO = digits.get_config()
SHAPES = {
    'digits': {
        'image_size': DEMO.data.image_size,
        'image_channels': DEMO.data.channels,
        **{
            key: DEMO.model[key] for key in ('channels', 'multipliers', 'num_blocks', 'attention_resolutions', 'groups')
        },
    },
    # Like CIFAR-10's network in size, depth and attention. The widths are such that every algorithm is chosen.
    'cifar10': dict(
        image_size=32,
        image_channels=3,
        channels=32,
        multipliers=(1, 4, 2, 2),
        num_blocks=1,
        attention_resolutions=(16,),
        groups=8,
    ),
    # Widths that fill no byte of a packed mask; sizes that Winograd's algorithms do not take; diffusers' choices.
    'odd': dict(
        image_size=6,
        image_channels=2,
        channels=12,
        multipliers=(1, 3),
        num_blocks=1,
        attention_resolutions=(3, 6),
        groups=3,
        head_channels=4,
        norm_epsilon=1e-5,
        downsample_padding=1,
        embedding_order='cos_sin',
        embedding_shift=0,
    ),
}
LARGE = 2**14  # so that the backward pass recomputes some activations of these small batches, and keeps others


def build(network, name, **settings):
    """(graph, parameters): all parameters are random, so that each of them has an effect."""
    make = functools.partial(network, **SHAPES[name], dtype=jnp.float32, **settings)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=make_rngs(default=0))))
    draw = np.random.default_rng(0)

    def parameter(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 16
        return np.float32(draw.normal(size=leaf.shape) / np.sqrt(fan_in))

    return graph, jax.tree.map(parameter, nnx.to_pure_dict(state))


def function(network, name, *, dropout, remat):
    """(f(params, x, t), params). It has dropout as in training, unless that is None."""
    graph, params = build(network, name, dropout=dropout or 0.0, remat=remat)

    def apply(params, x, t):
        mode = {} if dropout is None else dict(deterministic=False, rngs=make_rngs(dropout=7))
        return nnx.merge(graph, params)(x, t, **mode)

    return apply, params


def inputs(name):
    draw = np.random.default_rng(1)
    size, channels = SHAPES[name]['image_size'], SHAPES[name]['image_channels']
    x, weight = np.float32(draw.normal(size=(2, 2, size, size, channels)))
    return x, np.array([3, 700]), weight


def results(network, name, *, dropout, remat):
    """Output and gradients; if it is not for training, also the derivative in one direction."""
    apply, params = function(network, name, dropout=dropout, remat=remat)
    x, t, weight = inputs(name)
    draw = np.random.default_rng(2)
    direction = jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) * np.std(leaf)), (params, x))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, x):
        out, vjp = jax.vjp(lambda params, x: apply(params, x, t), params, x)
        if dropout is not None:
            return out, vjp(weight)
        return out, vjp(weight), jax.jvp(lambda params, x: apply(params, x, t), (params, x), direction)[1]

    return jax.device_get(run(params, x))


@functools.cache
def expected(name, dropout):
    return results(NETWORKS['unet'], name, dropout=dropout, remat=False)


@pytest.mark.parametrize(
    'implementation, name, dropout, remat',
    [
        pytest.param('cpu', 'digits', None, False, marks=pytest.mark.slow),
        pytest.param('cpu', 'digits', 0.3, True, marks=pytest.mark.slow),
        pytest.param('cpu', 'cifar10', None, False, marks=pytest.mark.slow),
        pytest.param('cpu', 'cifar10', 0.3, True, marks=pytest.mark.slow),
        pytest.param('cpu', 'odd', None, True, marks=pytest.mark.slow),
        ('cpu', 'odd', 0.3, False),
        pytest.param('gpu', 'cifar10', 0.3, True, marks=pytest.mark.slow),
        pytest.param('gpu', 'odd', None, True, marks=pytest.mark.slow),
        pytest.param('gpu', 'odd', 0.3, False, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_derivatives_are_those_of_the_plain_network(monkeypatch, implementation, name, dropout, remat):
    monkeypatch.setattr(cpu_unet, 'LARGE', LARGE)
    found = results(IMPLEMENTATIONS[implementation].NETWORKS['unet'], name, dropout=dropout, remat=remat)
    reference = expected(name, dropout or None)[: len(found)]
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(reference[1]))
    flat = jax.tree_util.tree_leaves_with_path(found)
    for (path, one), other in zip(flat, jax.tree.leaves(reference), strict=True):
        # Gradients are as exact as the largest of them, from which the others follow. That of a key's bias is rounding.
        floor = (1e-6 if "['key']['bias']" in jax.tree_util.keystr(path) else 2e-7) * largest
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(np.abs(other).max()) + floor, err_msg=path)


@pytest.mark.slow
def test_every_path_is_compared(monkeypatch):
    """Of the comparison above: each of Winograd's algorithms, direct convolutions, recomputation and its opposite."""
    monkeypatch.setattr(cpu_unet, 'LARGE', LARGE)
    calls = {'recomputed': 0, 'in_order': 0}
    for rule in calls:

        def counted(run, rule=rule, wrap=getattr(cpu_unet, rule)):
            calls[rule] += 1
            return wrap(run)

        monkeypatch.setattr(cpu_unet, rule, counted)
    apply, params = function(cpu.NETWORKS['unet'], 'cifar10', dropout=0.3, remat=False)
    x, t, weight = inputs('cifar10')
    loss = jax.grad(lambda params: (apply(params, x, t) * weight).sum())
    found = [equation for equation, _ in equations(jax.make_jaxpr(loss)(params).jaxpr)]
    winograd = {equation.params['algorithm'] for equation in found if equation.primitive.name == 'winograd'}
    assert winograd == {'same', 'doubled', 'halved', 'whole'}
    assert any(equation.primitive.name == 'conv_general_dilated' for equation in found)
    blocks = 4 * 1 + 2 + 4 * 2
    assert calls['in_order'] == blocks - 2  # those in the middle are in order as they are
    assert 0 < calls['recomputed'] < 2 * blocks
