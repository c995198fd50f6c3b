"""What only the implementation for CPUs does: the norm by its definition, and a backward pass that keeps little."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.networks import make_rngs
from diffusion.networks.cpu import unet
from diffusion.networks.cpu.unet import Attention, GroupNorm, ResBlock, UNet
from tests.xla_flags import QUICK

jit = functools.partial(jax.jit, compiler_options=QUICK)
PARTS = dict(groups=4, dtype=jnp.float32, rngs=make_rngs(default=0))


def block(*channels, dropout=0.0):
    """A residual block of random parameters."""
    graph, state = nnx.split(ResBlock(*channels, 16, dropout=dropout, **PARTS))
    draw = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) * 0.3), state))


@pytest.mark.parametrize(('shape', 'groups'), [((3, 8, 8, 32), 8), ((2, 5, 7, 12), 12), ((1, 1, 1, 6), 1)])
def test_the_norm_is_that_of_its_definition(shape, groups):
    """In float64: (x − mean)/√(variance + ε)·scale + bias over the pixels and channels of each group."""
    draw = np.random.default_rng(0)
    norm = GroupNorm(shape[-1], groups, epsilon=1e-6, rngs=make_rngs(default=0))
    x, scale, bias = draw.normal(size=shape) * 3 + 1, *draw.normal(size=(2, shape[-1]))
    norm.scale[...], norm.bias[...] = jnp.float32(scale), jnp.float32(bias)
    parts = x.reshape(shape[0], -1, groups, shape[-1] // groups)
    mean, variance = (f(parts, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    exact = ((parts - mean) / np.sqrt(variance + 1e-6)).reshape(shape) * scale + bias
    np.testing.assert_allclose(norm(jnp.float32(x)), exact, rtol=1e-5, atol=5e-6)


def test_norms_of_half_precision_are_computed_in_float32():
    draw = np.random.default_rng(0)
    norm = GroupNorm(8, 2, rngs=make_rngs(default=0))
    x, weight = (jnp.asarray(draw.normal(size=(2, 8, 8, 8)) + 3, jnp.bfloat16) for _ in range(2))
    single = x.astype(jnp.float32)
    assert jit(norm)(x).dtype == jnp.float32
    np.testing.assert_array_equal(jit(norm)(x), jit(norm)(single))
    found, exact = (jit(jax.grad(lambda x: (norm(x) * weight).sum()))(x) for x in (x, single))
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize('large', [0, math.inf])
def test_gradients_of_half_precision_are_rounded_once(monkeypatch, large):
    """The gradients by the norm's sums and by its input nearly cancel: they are added in float32."""
    monkeypatch.setattr(unet, 'LARGE', large)
    draw, layers = np.random.default_rng(0), block(8, 8)
    x, weight = (jnp.asarray(draw.normal(size=(2, 4, 4, 8)) + 3, jnp.bfloat16) for _ in range(2))

    def gradient(x):
        def loss(x):
            return (unet._activated_conv(layers.norm1, layers.conv1, x, training=True) * weight).sum()

        return jit(jax.grad(loss))(x)

    np.testing.assert_array_equal(gradient(x), gradient(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_the_key_bias_has_no_gradient():
    """Exactly none: Adam would make steps of any rounding error."""
    draw = np.random.default_rng(0)
    graph, state = nnx.split(Attention(16, **PARTS))
    state = jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape)), state)
    x = jnp.float32(draw.normal(size=(3, 4, 2, 16)))
    gradient = jit(jax.grad(lambda state: (nnx.merge(graph, state)(x) ** 2).sum()))(state)
    assert not gradient['key']['bias'][...].any()
    assert gradient['query']['bias'][...].any()


def test_little_is_kept_of_large_activations(monkeypatch):
    """Only the block's input, the input of its second norm, and the mask of dropout as bits."""

    def kept(large, dropout):
        """Bytes an element, of each array of an activation's size that the backward pass needs."""
        monkeypatch.setattr(unet, 'LARGE', large)
        layers, x = block(8, 8, dropout=dropout), jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
        _, vjp = jit(functools.partial(jax.vjp, lambda x: layers(x, jnp.ones((2, 16)), jax.random.key(0))))(x)
        leaves = [leaf for leaf in map(np.asarray, jax.tree.leaves(vjp)) if leaf.shape[:1] == (2,)]
        return sorted(len(array) / x.size for array in {leaf.tobytes() for leaf in leaves if leaf.size >= x.size / 8})

    assert kept(0, 0.0) == [4, 4]
    assert kept(0, 0.1) == [1 / 8, 4, 4]
    assert len(kept(math.inf, 0.1)) > 6


@pytest.mark.skipif(jax.device_count() > 1, reason='of a lone device')
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('remat', [True, False])
def test_rules_of_the_backward_pass(monkeypatch, training, remat):
    """Only training has them: they have no forward-mode derivatives."""
    used = []
    for name in ('in_order', 'recomputed'):
        monkeypatch.setattr(unet, name, lambda run, name=name: used.append(name) or run)
    settings = dict(image_size=8, image_channels=1, channels=8, multipliers=(1, 2), num_blocks=1, dropout=0.0)
    make = dict(attention_resolutions=(4,), groups=4, dtype=jnp.float32, remat=remat)
    graph, state = nnx.split(nnx.eval_shape(lambda: UNet(**settings, **make, rngs=make_rngs(default=0))))

    def call(state):
        mode = dict(deterministic=False, rngs=make_rngs(dropout=0)) if training else {}
        return nnx.merge(graph, state)(jnp.zeros((1, 8, 8, 1)), jnp.array([1]), **mode)

    jax.eval_shape(call, state)
    blocks = 2 * 1 + 2 * 2  # of the encoder and the decoder
    assert used == (['recomputed'] * remat + ['in_order']) * blocks * training
