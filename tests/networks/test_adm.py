"""OpenAI's network: the sizes of its published checkpoints, what its choices change, and which settings it refuses.

tests/peers/test_openai.py compares its outputs with those of another implementation.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.networks import make_rngs
from diffusion.networks.adm import ADM, ResBlock
from diffusion.networks.unet import Attention, UNet
from tests.jaxprs import equations
from tests.networks.test_unet import SMALL, abstract, count, jit, random_state

PAPER = SMALL | dict(
    image_channels=3,
    multipliers=(1, 2, 3, 4),
    num_blocks=3,
    attention_resolutions=(32, 16, 8),
    groups=32,
    out_channels=6,
)
GUIDED = PAPER | dict(head_channels=64, resblock_updown=True)
IMPROVED = PAPER | dict(channels=128, attention_resolutions=(16, 8), num_heads=4)
X, T = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([3, 700])


def make(**settings):
    return nnx.eval_shape(lambda: ADM(**settings, rngs=make_rngs(params=jax.random.key(0))))


# Counted over the names and shapes in the checkpoints, as tests/peers/openai_network.py lists them. They are the 296M
# of arXiv:2105.05233 and the 120M of arXiv:2102.09672.
@pytest.mark.slow
@pytest.mark.parametrize(
    'settings, parameters',
    [
        # guided-diffusion's 64x64_diffusion.pt, and a row more for no class, which it lacks.
        (GUIDED | dict(image_size=64, channels=192, num_classes=1000), 295_904_454 + 4 * 192),
        # improved-diffusion's imagenet64_uncond_100M_1500K.pt.
        (IMPROVED | dict(image_size=64), 121_063_942),
    ],
)
def test_parameters_of_the_published_checkpoints(settings, parameters):
    assert count(make(**settings)) == parameters


def test_without_its_choices_it_is_the_unet():
    """The embedding added, convolutions that change the size, one head: the same tree, and equal outputs."""
    as_unet = dict(norm_epsilon=1e-5, downsample_padding=1, embedding_order='cos_sin', embedding_shift=0, num_classes=3)
    graph, state = nnx.split(make(**SMALL, scale_shift_norm=False, num_classes=3))
    other, like = nnx.split(abstract(**SMALL | as_unet))
    params = nnx.to_pure_dict(random_state(state))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nnx.to_pure_dict(like))
    labels = jnp.array([2, -1])
    ours, theirs = jit(lambda params: [nnx.merge(g, params)(X, T, labels) for g in (graph, other)])(params)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_output_has_its_own_channels():
    network = make(**SMALL, out_channels=2, resblock_updown=True)
    assert nnx.eval_shape(lambda n: n(X, T), network).shape == (2, 8, 8, 2)


@pytest.mark.parametrize('resblock_updown', [False, True])
def test_remat_recomputes_each_block(resblock_updown):
    """Of encoder and decoder, and what changes the size; not those in the middle, as in the U-Net."""
    graph, state = nnx.split(make(**SMALL, remat=True, resblock_updown=resblock_updown))
    jaxpr = jax.make_jaxpr(lambda state: nnx.merge(graph, state)(X, T))(state).jaxpr
    found = sum(equation.primitive.name.startswith('remat') for equation, _ in equations(jaxpr))
    assert found == 2 * 1 + 2 * 2 + 2 * resblock_updown


def test_a_block_starts_as_what_it_does_to_the_size():
    """The average of 2×2 pixels, each pixel four times, or the identity."""
    parts = dict(groups=4, norm_epsilon=1e-5, dropout=0.0, dtype=jnp.float32, scale_shift_norm=True)
    parts['rngs'] = make_rngs(params=jax.random.key(0))
    x, emb = jax.random.normal(jax.random.key(1), (2, 4, 4, 8)), jnp.ones((2, 16))
    blocks = {name: ResBlock(8, 8, 16, resize=name, **parts) for name in ('same', 'half', 'double')}
    found = jit(lambda x, emb: {name: block(x, emb) for name, block in blocks.items()})(x, emb)
    np.testing.assert_array_equal(found['same'], x)
    means = np.asarray(x).reshape(2, 2, 2, 2, 2, 8).mean((2, 4))
    np.testing.assert_allclose(found['half'], means, atol=1e-6)
    np.testing.assert_array_equal(found['double'], np.kron(x, np.ones((1, 2, 2, 1))))


def test_the_embedding_scales_and_shifts_what_is_normalized():
    """Its first half is the scale: with −1 only the second half, the shift, is left."""
    parts = dict(groups=4, norm_epsilon=1e-5, dropout=0.0, dtype=jnp.float32, scale_shift_norm=True)
    graph, state = nnx.split(nnx.eval_shape(lambda: ResBlock(8, 8, 16, **parts, rngs=make_rngs(params=0))))
    block = nnx.merge(graph, random_state(state))
    block.time.kernel.set_value(jnp.zeros((16, 16)))
    block.time.bias.set_value(jnp.repeat(jnp.array([-1.0, 0.7]), 8))
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    expected = x + block.conv2(jnp.full(x.shape, nnx.silu(0.7)))
    np.testing.assert_allclose(block(x, jnp.ones((2, 16))), expected, atol=1e-5)


@pytest.mark.parametrize('settings, heads', [(dict(num_heads=4), {4}), (dict(head_channels=4), {2, 4}), ({}, {1})])
def test_heads_by_their_number_or_their_channels(settings, heads):
    network = make(**SMALL | dict(attention_resolutions=(8, 4)) | settings)
    found = {node.heads for _, node in nnx.iter_graph(network) if isinstance(node, Attention)}
    assert found == heads


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(num_heads=3), r'16 is not divisible by num_heads = 3'),
        (dict(head_channels=5), r'16 is not divisible by head_channels = 5'),
        (dict(image_size=9), '8 or 10 would do'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make(**SMALL | change)


def test_the_networks_have_the_same_arguments():
    """Except for what only this one has: a config may change model.network alone."""
    ours, theirs = (set(inspect.signature(network.__init__).parameters) for network in (ADM, UNet))
    assert ours - theirs == {'num_heads', 'scale_shift_norm', 'resblock_updown', 'updown_levels'} and theirs <= ours
