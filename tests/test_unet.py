"""The U-Net: its counts from the papers, its layout from Ho's code, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.networks import unet
from diffusion.networks.unet import Attention, ResBlock, UNet, advance, time_embedding

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


def abstract(**settings):
    return nnx.eval_shape(lambda: UNet(**settings, rngs=nnx.Rngs(0)))


def count(network):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(network)))


def program(change, parameters):
    """The network with `parameters(shape, dtype)` in place of each of its own, jitted."""
    settings = SMALL | change
    graph, state = nnx.split(abstract(**settings))
    state = jax.tree.map(lambda leaf: parameters(leaf.shape).astype(leaf.dtype), state)
    return jax.jit(nnx.merge(graph, state), static_argnames='deterministic')


def awake(seed=0, **change):
    """A small network whose parameters are all random, so that every path is heard."""
    draw = np.random.default_rng(seed)
    return program(change, lambda shape: draw.normal(size=shape) * 0.5 / math.sqrt(math.prod(shape[:-1]) or 1))


@pytest.mark.parametrize(
    'image_size, multipliers, parameters',
    [
        (32, (1, 2, 2, 2), 35_746_307),  # CIFAR-10, DDPM
        (64, (1, 2, 2, 2, 4), 78_700_803),  # CelebA, DDIM
        (256, (1, 1, 2, 2, 4, 4), 113_673_219),  # LSUN and CelebA-HQ, DDPM
    ],
)
def test_parameters_of_the_papers(image_size, multipliers, parameters):
    assert count(abstract(**(PAPER | dict(image_size=image_size, multipliers=multipliers)))) == parameters


def test_layout_of_ho():
    """Two blocks a level down, three up, an attention after each of them at 16 and one in the middle."""
    network = abstract(**(PAPER | dict(image_size=32, multipliers=(1, 2, 2, 2))))
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


def test_it_starts_at_zero_and_hears_image_and_level():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    key = jax.random.key(0, impl='unsafe_rbg')  # quick to compile
    fresh = jax.jit(lambda x, t: UNet(**SMALL, rngs=nnx.Rngs(key))(x, t))
    np.testing.assert_array_equal(fresh(x, jnp.array([1, 2])), 0)
    network = awake()
    out = network(x, jnp.array([5, 5]))
    assert out.shape == x.shape and out.dtype == jnp.float32 and np.all(np.isfinite(out))
    assert np.abs(network(x, jnp.array([6, 5])) - out)[0].max() > 1e-3
    np.testing.assert_allclose(network(x, jnp.array([6, 5]))[1], out[1], atol=1e-6)  # images do not mix
    np.testing.assert_allclose(network(x[::-1], jnp.array([5, 5])), out[::-1], atol=1e-6)


def test_each_branch_starts_as_nothing():
    """A fresh block is its shortcut, an attention the identity: the last layers start at zero, as Ho's."""

    @jax.jit
    def fresh(key, x, emb):
        how = dict(groups=4, dtype=jnp.float32, rngs=nnx.Rngs(key))
        block = ResBlock(8, 12, 16, dropout=0.0, **how)
        return (block(x, emb, None), block.shortcut(x)), (Attention(8, **how)(x, False), x)

    x, emb = jax.random.normal(jax.random.key(1), (2, 4, 4, 8)), jax.random.normal(jax.random.key(2), (2, 16))
    for answer, expected in fresh(jax.random.key(0, impl='unsafe_rbg'), x, emb):  # quick to compile
        np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-6)
        assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize('large', [0, math.inf])
@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_attention_is_that_of_jax_by_its_four_layers(monkeypatch, dtype, tolerance, large):
    """And so are its gradients, from which those of the layers have to be found again. All biases are heard but the
    keys', which has no say: as its gradient is zero exactly, Adam has no rounding to make steps of."""
    monkeypatch.setattr(unet, 'LARGE', large)
    draw = np.random.default_rng(0)
    graph, state = nnx.split(Attention(16, groups=4, dtype=dtype, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape)) / math.sqrt(leaf.shape[0]), state)
    x, weight = (jnp.float32(draw.normal(size=(3, 4, 2, 16))) for _ in range(2))

    def by_jax(state, x):
        layers = nnx.merge(graph, state)
        h = layers.norm(x).reshape(3, 8, 1, 16)
        query, key, value = (
            h @ linear.kernel[...] + linear.bias[...] for linear in (layers.query, layers.key, layers.value)
        )
        attended = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        return x + attended @ layers.out.kernel[...] + layers.out.bias[...]

    def with_gradients(f):
        return jax.jit(lambda *args: (f(*args), jax.grad(lambda *args: (f(*args) * weight).sum(), (0, 1))(*args)))

    ours, (ours_of_state, ours_of_x) = with_gradients(lambda state, x: nnx.merge(graph, state)(x, True))(state, x)
    theirs, (theirs_of_state, theirs_of_x) = with_gradients(by_jax)(state, x)
    for one, other in [(ours, theirs), (ours_of_x, theirs_of_x)]:
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs_of_state))
    for one, other in zip(jax.tree.leaves(ours_of_state), jax.tree.leaves(theirs_of_state), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)
    assert not ours_of_state['key']['bias'][...].any()
    assert np.abs(ours_of_state['query']['bias'][...]).max() > 0.01 * scale


@pytest.mark.parametrize(
    'size, channels, multipliers', [(4, 5, (1, 1, 2)), (12, 2, (1, 2)), (7, 3, (2,)), (64, 1, (1, 1))]
)
def test_any_size_and_number_of_channels(size, channels, multipliers):
    settings = dict(image_size=size, image_channels=channels, multipliers=multipliers, attention_resolutions=())
    network = abstract(**(SMALL | settings))
    x = jax.ShapeDtypeStruct((3, size, size, channels), jnp.float32)
    assert nnx.eval_shape(lambda n, x: n(x, jnp.zeros(3)), network, x).shape == x.shape


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(image_size=9), '8 or 10 would do'),
        (dict(image_size=3, multipliers=(1, 1, 1)), '4 would do'),
        (dict(channels=6), 'not divisible by the 4 groups'),
        (dict(channels=5, groups=5), 'even'),
        (dict(attention_resolutions=(16,)), r'\[16\].*\[8, 4\]'),
        (dict(multipliers=()), 'multipliers'),
        (dict(multipliers=(1, 0)), 'multipliers'),
        (dict(num_blocks=0), 'num_blocks'),
        (dict(dropout=1.0), 'dropout'),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        abstract(**(SMALL | change))


def test_dropout():
    network = awake(dropout=0.5)
    x, t = jnp.ones((2, 8, 8, 1)), jnp.array([3, 3])
    quiet = network(x, t)
    np.testing.assert_array_equal(quiet, network(x, t))
    loud = [network(x, t, deterministic=False, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(loud[0], loud[1])
    assert np.abs(loud[0] - loud[2]).max() > 1e-3 and np.abs(loud[0] - quiet).max() > 1e-3
    assert np.abs(loud[0][0] - loud[0][1]).max() > 1e-3  # each image drops its own


@pytest.mark.parametrize('large', [0, math.inf])
def test_dropout_is_that_of_flax(monkeypatch, large):
    """Of 12 channels, which do not fill their bytes of packed bits."""
    monkeypatch.setattr(unet, 'LARGE', large)
    draw = np.random.default_rng(0)
    block = ResBlock(8, 12, 16, dropout=0.3, groups=4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    block.conv2.kernel[...] = draw.normal(size=block.conv2.kernel.shape)
    x, emb = (jnp.float32(draw.normal(size=shape)) for shape in ((2, 4, 4, 8), (2, 16)))
    key = jax.random.key(1)

    def by_flax(x):
        h = block.conv1(nnx.silu(block.norm1(x))) + block.time(nnx.silu(emb))[:, None, None]
        h = nnx.Dropout(0.3)(nnx.silu(block.norm2(h)), deterministic=False, rngs=key)
        return block.shortcut(x) + block.conv2(h)

    def value_and_gradient(function):
        return jax.jit(jax.value_and_grad(lambda x: (function(x) ** 2).sum()))(x)

    for found, expected in zip(*map(value_and_gradient, (lambda x: block(x, emb, key), by_flax)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_each_block_drops_by_a_key_of_its_own(monkeypatch):
    """And at another call by others."""
    keys = []

    def tell(block, x, emb, dropout_key):
        keys.append(jax.random.key_data(dropout_key))
        return jnp.zeros((*x.shape[:-1], block.conv2.out_features))

    monkeypatch.setattr(ResBlock, '__call__', tell)
    monkeypatch.setattr(unet, 'in_order', lambda run: run)  # its rule for the way back may leave no traces elsewhere

    @jax.jit
    def calls(key):
        network, rngs = UNet(**SMALL | dict(num_blocks=2), rngs=nnx.Rngs(key)), nnx.Rngs(dropout=0)
        for _ in range(2):
            network(jnp.zeros((1, 8, 8, 1)), jnp.array([1]), deterministic=False, rngs=rngs)
        return jnp.stack(keys)

    found = calls(jax.random.key(0))
    assert len(np.unique(found, axis=0)) == len(found) == 2 * (2 * 2 + 2 + 2 * 3)  # down, in the middle, up


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([3, 700])
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(abstract(**SMALL | dict(dtype=jnp.bfloat16))))} == {
        jnp.dtype('float32')
    }
    out, expected = awake(dtype=jnp.bfloat16)(x, t), awake()(x, t)
    assert out.dtype == jnp.float32
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.03


def test_a_layer_turned_by_a_step_says_at_t_what_it_said_one_later():
    """To the rounding of float32 angles, which at level 1000 is 6e-5; another turn would be far off."""
    kernel = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    t = np.array([0, 1, 37, 500, 999])
    later = time_embedding(t + 1, 64) @ kernel
    np.testing.assert_allclose(time_embedding(t, 64) @ advance(kernel), later, atol=1e-3)
    assert np.abs(time_embedding(t, 64) @ kernel - later).max() > 0.1


@pytest.mark.parametrize('large', [0, math.inf])
def test_training_has_the_gradients_of_the_function_that_it_computes(monkeypatch, large):
    """It has rules of its own for the way back, others of large images. Without dropout the function is that of
    sampling."""
    monkeypatch.setattr(unet, 'LARGE', large)
    draw = np.random.default_rng(0)
    graph, state = nnx.split(abstract(**SMALL | dict(image_size=4, multipliers=(1,), attention_resolutions=())))
    state = jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.2), state)
    x, t = jnp.float32(draw.normal(size=(2, 4, 4, 1))), jnp.array([3, 700])

    def gradients(training):
        def value(state, x):
            how = dict(deterministic=False, rngs=nnx.Rngs(dropout=0)) if training else {}
            return (nnx.merge(graph, state)(x, t, **how) ** 2).sum()

        return jax.tree.leaves(jax.jit(jax.grad(value, (0, 1)))(state, x))

    for one, other in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max() + 1e-30)


@pytest.mark.parametrize('large', [0, math.inf])
def test_the_gradient_of_an_image_in_half_precision_is_rounded_once(monkeypatch, large):
    monkeypatch.setattr(unet, 'LARGE', large)
    draw = np.random.default_rng(0)
    block = ResBlock(8, 8, 16, dropout=0.0, groups=4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x, weight = (jnp.asarray(draw.normal(size=(2, 4, 4, 8)) + 3, jnp.bfloat16) for _ in range(2))

    def gradient(x):
        return jax.grad(lambda x: (unet._activated(block.norm1, block.conv1, x, training=True) * weight).sum())(x)

    np.testing.assert_array_equal(gradient(x), gradient(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_little_is_kept_of_large_images(monkeypatch):
    """Of a block's arrays of an image's size, what leads on: its input and what its second convolution starts from.
    Of an attention's, its input alone."""
    how = dict(groups=4, dtype=jnp.float32, rngs=nnx.Rngs(0))

    def kept(large, layer):
        monkeypatch.setattr(unet, 'LARGE', large)
        x = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
        _, back = jax.vjp(layer, x)
        leaves = [leaf for leaf in map(np.asarray, jax.tree.leaves(back)) if leaf.shape[:1] == (2,)]
        arrays = {leaf.tobytes() for leaf in leaves if leaf.size >= x.size / 8}
        return sorted(len(array) / x.size for array in arrays)  # bytes of a number of the image

    def block(dropout):
        layer = ResBlock(8, 8, 16, dropout=dropout, **how)
        return lambda x: layer(x, jnp.ones((2, 16)), jax.random.key(0))

    def attention():
        layer = Attention(8, **how)
        return lambda x: layer(x, True)

    assert kept(0, block(0.0)) == [4, 4]
    assert kept(0, block(0.1)) == [1 / 8, 4, 4]
    assert len(kept(math.inf, block(0.1))) > 6
    assert kept(0, attention()) == [4]
    assert len(kept(math.inf, attention())) > 3


@pytest.mark.skipif(jax.default_backend() != 'cpu' or jax.device_count() > 1, reason='of a lone CPU')
@pytest.mark.parametrize('training, remat', [(True, False), (True, True), (False, False), (False, True)])
def test_rules_for_the_way_back(monkeypatch, training, remat):
    """In training images wait for parameters, with remat, too; without, nothing bars derivatives forwards but remat."""
    used = []

    def told(name):
        return lambda run: used.append(name) or run

    for name in ('in_order', 'recomputed'):
        monkeypatch.setattr(unet, name, told(name))
    graph, state = nnx.split(abstract(**SMALL, remat=remat))

    def call(state):
        how = dict(deterministic=False, rngs=nnx.Rngs(dropout=0)) if training else {}
        return nnx.merge(graph, state)(jnp.zeros((1, 8, 8, 1)), jnp.array([1]), **how)

    jax.eval_shape(call, state)
    blocks = 2 * 1 + 2 * 2  # down and up, at two resolutions
    assert used == (['recomputed'] * remat + ['in_order'] * training) * blocks
