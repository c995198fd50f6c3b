"""Group normalization beside Flax's, and by its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.networks.norm import GroupNorm


def pair(channels, groups, seed=0):
    """Ours and Flax's, with the same random scale and bias."""
    draw = np.random.default_rng(seed)
    scale, bias = (jnp.asarray(draw.normal(size=channels), jnp.float32) for _ in range(2))
    norms = [kind(channels, groups, epsilon=1e-6, rngs=nnx.Rngs(0)) for kind in (GroupNorm, nnx.GroupNorm)]
    for norm in norms:
        norm.scale[...], norm.bias[...] = scale, bias
    return norms, draw


@pytest.mark.parametrize(('shape', 'groups'), [((3, 8, 8, 32), 8), ((2, 5, 7, 12), 12), ((1, 1, 1, 6), 1)])
def test_it_is_that_of_flax_and_so_are_its_gradients(shape, groups):
    norms, draw = pair(shape[-1], groups)
    x = jnp.asarray(draw.normal(size=shape) + 0.5, jnp.float32)
    out_gradient = jnp.asarray(draw.normal(size=shape), jnp.float32)
    found = []
    for norm in norms:
        graph, state = nnx.split(norm)
        out, back = jax.vjp(lambda state, x, graph=graph: nnx.merge(graph, state)(x), state, x)
        found.append([out, *jax.tree.leaves(back(out_gradient))])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(jnp.abs(theirs).max()) + 1e-6)


def test_it_is_what_the_definition_says():
    (norm, _), draw = pair(6, 3)
    x = draw.normal(size=(2, 4, 4, 6)) * 3 + 1
    parts = x.reshape(2, 16, 3, 2)
    mean, variance = (f(parts, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    exact = ((parts - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    exact = exact * np.asarray(norm.scale[...], np.float64) + np.asarray(norm.bias[...], np.float64)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), exact, rtol=1e-5, atol=2e-6)


def test_half_precision_goes_in_and_float32_comes_out():
    """Statistics of bfloat16 numbers are those of the same numbers in float32."""
    (norm, _), draw = pair(8, 2)
    x = jnp.asarray(draw.normal(size=(2, 16, 16, 8)), jnp.bfloat16)
    out = norm(x)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, norm(x.astype(jnp.float32)))


def test_a_gradient_in_half_precision_is_rounded_once():
    """What comes by the statistics nearly cancels the rest: the two are added up before."""
    (norm, _), draw = pair(8, 2)
    x, weight = (jnp.asarray(draw.normal(size=(2, 8, 8, 8)) + 3, jnp.bfloat16) for _ in range(2))
    found, exact = (jax.grad(lambda x: (norm(x) * weight).sum())(x) for x in (x, x.astype(jnp.float32)))
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_its_first_parameters_are_those_of_flax():
    """Also the random numbers that are used up in making it, so that layers made after it start as they did."""
    rngs = [nnx.Rngs(3), nnx.Rngs(3)]
    GroupNorm(8, 2, rngs=rngs[0]), nnx.GroupNorm(8, 2, rngs=rngs[1])
    assert rngs[0].params() == rngs[1].params()
