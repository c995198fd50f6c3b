"""The U-Net: its counts from the papers, its layout from Ho's code, and which settings it refuses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.networks import make_rngs
from diffusion.networks.embedding import advance, time_embedding
from diffusion.networks.unet import Attention, GroupNorm, ResBlock, UNet
from tests.xla_flags import QUICK

SMALL = dict(
    image_size=8,
    image_channels=1,
    channels=8,
    multipliers=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    dropout=0.0,
    groups=4,
    dtype=jnp.float32,
)
PAPER = SMALL | dict(image_channels=3, channels=128, num_blocks=2, attention_resolutions=(16,), groups=32)


jit = functools.partial(jax.jit, compiler_options=QUICK)


def abstract(**settings):
    return nnx.eval_shape(lambda: UNet(**settings, rngs=make_rngs(default=0)))


def count(network):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(network)))


def random_state(state, scale=0.5, seed=0):
    """Parameters that are all random, so that each of them has an effect."""
    draw = np.random.default_rng(seed)

    def parameter(leaf):
        return np.asarray(draw.normal(size=leaf.shape) * scale / math.sqrt(math.prod(leaf.shape[:-1])), leaf.dtype)

    return jax.tree.map(parameter, state)


def awake(**change):
    """A small network of random parameters, jitted."""
    graph, state = nnx.split(abstract(**SMALL | change))
    return jit(nnx.merge(graph, random_state(state)), static_argnames='deterministic')


@pytest.fixture(scope='module')
def network():
    return awake()


X = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))


@pytest.mark.parametrize(
    'image_size, multipliers, parameters',
    [
        (32, (1, 2, 2, 2), 35_746_307),  # CIFAR-10, DDPM
        (64, (1, 2, 2, 2, 4), 78_700_803),  # CelebA, DDIM
        (256, (1, 1, 2, 2, 4, 4), 113_673_219),  # LSUN and CelebA-HQ, DDPM
    ],
)
def test_parameters_of_the_papers(image_size, multipliers, parameters):
    assert count(abstract(**PAPER | dict(image_size=image_size, multipliers=multipliers))) == parameters


def test_layout_of_ho():
    """Two blocks a resolution in the encoder, three in the decoder; at 16×16 each with attention, and in the middle."""
    network = abstract(**PAPER | dict(image_size=32, multipliers=(1, 2, 2, 2)))
    nodes = [node for _, node in nnx.iter_graph(network)]
    assert sum(isinstance(node, ResBlock) for node in nodes) == 4 * 2 + 2 + 4 * 3
    assert sum(isinstance(node, Attention) for node in nodes) == 2 + 1 + 3
    assert [len(stage.attentions) for stage in network.up] == [0, 0, 3, 0]
    norms = [node for node in nodes if isinstance(node, nnx.GroupNorm)]
    assert {norm.epsilon for norm in norms} == {1e-6} and {norm.num_groups for norm in norms} == {32}


def test_time_embedding_is_sin_then_cos_with_half_minus_one():
    t = np.array([0, 1, 37, 1000])
    half = 64
    frequencies = np.exp(-np.log(10_000) * np.arange(half) / (half - 1))
    expected = np.concatenate([np.sin(t[:, None] * frequencies), np.cos(t[:, None] * frequencies)], axis=1)
    np.testing.assert_allclose(time_embedding(jnp.asarray(t), 128), expected, atol=1e-4)
    np.testing.assert_allclose(time_embedding(jnp.array([0.5]), 4), [[math.sin(0.5), math.sin(5e-5), math.cos(0.5), 1]])
    other = [[math.cos(0.5), math.cos(5e-3), math.sin(0.5), math.sin(5e-3)]]  # 10000^(−1/2)
    np.testing.assert_allclose(time_embedding(jnp.array([0.5]), 4, 'cos_sin', 0), other, rtol=1e-6)


@pytest.mark.parametrize('how', [('sin_cos', 1), ('cos_sin', 0)])
def test_the_advanced_layer_returns_at_t_what_the_layer_returns_at_the_next_level(how):
    """Up to the rounding of float32 angles, which at level 1000 is 6e-5. Other signs would be far off."""
    kernel = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    t = np.array([0, 1, 37, 500, 999])
    later = time_embedding(t + 1, 64, *how) @ kernel
    np.testing.assert_allclose(time_embedding(t, 64, *how) @ advance(kernel, *how), later, atol=1e-3)
    assert np.abs(time_embedding(t, 64, *how) @ kernel - later).max() > 0.1


@pytest.mark.slow
def test_an_initial_network_returns_zero():
    fresh = jit(lambda key: UNet(**SMALL, rngs=make_rngs(default=key))(X, jnp.array([1, 2])))
    np.testing.assert_array_equal(fresh(jax.random.key(0, impl='unsafe_rbg')), 0)  # quick to compile


def test_the_output_depends_on_image_and_level_and_on_no_other_image(network):
    out = network(X, jnp.array([5, 5]))
    assert out.shape == X.shape and out.dtype == jnp.float32 and np.all(np.isfinite(out))
    assert np.abs(network(X, jnp.array([6, 5])) - out)[0].max() > 1e-3
    np.testing.assert_allclose(network(X, jnp.array([6, 5]))[1], out[1], atol=1e-6)
    np.testing.assert_allclose(network(X[::-1], jnp.array([5, 5])), out[::-1], atol=1e-6)


def test_each_branch_starts_at_zero():
    """An initial block is its shortcut, an initial attention the identity."""

    @jit
    def fresh(key, x, emb):
        parts = dict(groups=4, dtype=jnp.float32, rngs=make_rngs(default=key))
        block = ResBlock(8, 12, 16, dropout=0.0, **parts)
        return (block(x, emb), block.shortcut(x)), (Attention(8, **parts)(x), x)

    x, emb = jax.random.normal(jax.random.key(1), (2, 4, 4, 8)), jax.random.normal(jax.random.key(2), (2, 16))
    for answer, expected in fresh(jax.random.key(0, impl='unsafe_rbg'), x, emb):  # quick to compile
        np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-6)
        assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize('head_channels', [0, 4])
def test_attention_is_that_of_its_equation(head_channels):
    """x + concat over heads of softmax(q·kᵀ/√C)·v, times Wo, + bo, over all pixels, in float64."""
    graph, state = nnx.split(
        Attention(16, groups=4, head_channels=head_channels, dtype=jnp.float32, rngs=make_rngs(default=0))
    )
    layers = nnx.merge(graph, random_state(state, scale=1.0))
    x = np.random.default_rng(1).normal(size=(3, 4, 2, 16))
    tokens = np.asarray(layers.norm(jnp.float32(x)), np.float64).reshape(3, 8, 16)

    def linear(layer, values):
        return values @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)

    width, attended = head_channels or 16, []
    for first in range(0, 16, width):
        query, key, value = (
            linear(layer, tokens)[..., first : first + width] for layer in (layers.query, layers.key, layers.value)
        )
        logits = query @ key.swapaxes(1, 2) / math.sqrt(width)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        attended.append(weights / weights.sum(-1, keepdims=True) @ value)
    expected = x + linear(layers.out, np.concatenate(attended, axis=-1)).reshape(x.shape)
    np.testing.assert_allclose(layers(jnp.float32(x)), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize('padding', [0, 1])
def test_downsampling_pads_one_pixel_below_and_to_the_right(padding):
    """Output i is of the pixels 2i − padding … 2i − padding + 2; those outside of the image are 0."""
    graph, state = nnx.split(abstract(**SMALL | dict(downsample_padding=padding)))
    layer = nnx.merge(graph, random_state(state)).down[0].resample
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 8))
    padded = np.pad(x, ((0, 0), (padding, 1), (padding, 1), (0, 0)))
    taps = np.asarray(layer.kernel[...], np.float64)
    expected = sum(padded[:, i : i + 7 : 2, j : j + 7 : 2] @ taps[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(layer(jnp.float32(x)), expected + np.asarray(layer.bias[...]), atol=1e-5)


@pytest.mark.parametrize(
    'size, channels, multipliers', [(4, 5, (1, 1, 2)), (12, 2, (1, 2)), (7, 3, (2,)), (64, 1, (1, 1))]
)
def test_any_size_and_number_of_channels(size, channels, multipliers):
    settings = dict(image_size=size, image_channels=channels, multipliers=multipliers, attention_resolutions=())
    network = abstract(**SMALL | settings)
    x = jax.ShapeDtypeStruct((3, size, size, channels), jnp.float32)
    assert nnx.eval_shape(lambda n, x: n(x, jnp.zeros(3)), network, x).shape == x.shape


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(image_size=9), '8 or 10 would do'),
        (dict(image_size=3, multipliers=(1, 1, 1)), '4 would do'),
        (dict(channels=6), 'not divisible by groups = 4'),
        (dict(channels=6, multipliers=(2, 4)), 'channels = 6 is not divisible by groups = 4'),
        (dict(channels=5, groups=5), 'even'),
        (dict(attention_resolutions=(16,)), r'\[16\].*\[8, 4\]'),
        (dict(multipliers=()), 'multipliers'),
        (dict(multipliers=(1, 0)), 'multipliers'),
        (dict(num_blocks=0), 'num_blocks'),
        (dict(dropout=1.0), 'dropout'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        abstract(**SMALL | change)


def test_dropout():
    network = awake(dropout=0.5)
    x, t = jnp.ones((2, 8, 8, 1)), jnp.array([3, 3])
    without = network(x, t)
    np.testing.assert_array_equal(without, network(x, t))
    outputs = [network(x, t, deterministic=False, rngs=make_rngs(dropout=seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3 and np.abs(outputs[0] - without).max() > 1e-3
    assert np.abs(outputs[0][0] - outputs[0][1]).max() > 1e-3  # each image has a mask of its own


def test_each_block_has_a_dropout_key_of_its_own(monkeypatch):
    """And another at the next call."""
    keys = []

    def record(block, x, emb, dropout_key):
        keys.append(jax.random.key_data(dropout_key))
        return jnp.zeros((*x.shape[:-1], block.conv2.out_features))

    monkeypatch.setattr(ResBlock, '__call__', record)

    @jit
    def calls(key):
        network, rngs = UNet(**SMALL | dict(num_blocks=2), rngs=make_rngs(default=key)), make_rngs(dropout=0)
        for _ in range(2):
            network(jnp.zeros((1, 8, 8, 1)), jnp.array([1]), deterministic=False, rngs=rngs)
        return jnp.stack(keys)

    found = calls(jax.random.key(0))
    assert len(np.unique(found, axis=0)) == len(found) == 2 * (2 * 2 + 2 + 2 * 3)  # encoder, middle, decoder


@pytest.mark.slow
def test_remat_keeps_only_the_inputs_of_each_block_and_changes_nothing():
    t = jnp.array([3, 700])
    graph, state = nnx.split(abstract(**SMALL | dict(dropout=0.5)))
    state = random_state(state)
    checkpointed, _ = nnx.split(abstract(**SMALL | dict(dropout=0.5, remat=True)))

    def loss(state, graph):
        return (nnx.merge(graph, state)(X, t, deterministic=False, rngs=make_rngs(dropout=0)) ** 2).sum()

    def kept(graph):
        """Elements of what the backward pass needs, in images of the input's size."""
        vjp = jax.eval_shape(lambda state: jax.vjp(lambda state: loss(state, graph), state)[1], state)
        return sum(leaf.size for leaf in jax.tree.leaves(vjp)) / X.size

    assert kept(checkpointed) < 0.5 * kept(graph)
    gradients = jit(jax.grad(loss), static_argnums=1)
    for one, other in zip(*(jax.tree.leaves(gradients(state, g)) for g in (graph, checkpointed)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max() + 1e-6)


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(network):
    t = jnp.array([3, 700])
    half = abstract(**SMALL | dict(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype('float32')}
    out, expected = awake(dtype=jnp.bfloat16)(X, t), network(X, t)
    assert out.dtype == jnp.float32
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.03


def test_norms_of_half_precision_are_computed_in_float32():
    """Outputs, and gradients: the sum of several terms that nearly cancel, rounded once."""
    draw = np.random.default_rng(0)
    norm = GroupNorm(8, 2, rngs=make_rngs(default=0))
    x, weight = (jnp.asarray(draw.normal(size=(2, 8, 8, 8)) + 3, jnp.bfloat16) for _ in range(2))
    single = x.astype(jnp.float32)
    assert jit(norm)(x).dtype == jnp.float32
    np.testing.assert_array_equal(jit(norm)(x), jit(norm)(single))
    found, exact = (jit(jax.grad(lambda x: (norm(x) * weight).sum()))(x) for x in (x, single))
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
