"""The convolution of CPUs against jax.lax's own, with its derivatives in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks.conv import conv_general_dilated

HOW = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}


def arrays(size, height=6, width=8, seed=0):
    """(x, kernel, gradient), and another x and kernel."""
    shapes = [(3, height, width, 5), (size, size, 5, 7), (3, height, width, 7)]
    keys = jax.random.split(jax.random.key(seed), 5)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes + shapes[:2], strict=True)]


def both(strides=(1, 1), padding='SAME'):
    """Ours and theirs as functions of x and kernel."""
    return [
        lambda x, kernel, f=f: f(x, kernel, strides, padding, **HOW)
        for f in (conv_general_dilated, jax.lax.conv_general_dilated)
    ]


def assert_close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize('size', [1, 3, 5])
def test_values_and_derivatives_are_those_of_jax(size):
    x, kernel, gradient, dx, dkernel = arrays(size)
    ours, theirs = both()
    assert_close(ours(x, kernel), theirs(x, kernel))
    assert_close(jax.vjp(ours, x, kernel)[1](gradient), jax.vjp(theirs, x, kernel)[1](gradient))
    assert_close(jax.jvp(ours, (x, kernel), (dx, dkernel)), jax.jvp(theirs, (x, kernel), (dx, dkernel)))


@pytest.mark.parametrize('which', [0, 1])
def test_either_argument_alone_can_be_differentiated(which):
    """Also many times at once, as the probability flow does."""
    *primals, gradient, dx, dkernel = arrays(3)
    ours, theirs = (lambda a, f=f: f(*(a if i == which else primals[i] for i in (0, 1))) for f in both())
    of = (dx, dkernel)[which]
    for f in (jax.jit(ours), ours):
        assert_close(jax.vjp(f, primals[which])[1](gradient), jax.vjp(theirs, primals[which])[1](gradient))
    several = jnp.stack([of, 2 * of, of - 1])
    derivatives = [jax.linearize(f, primals[which])[1] for f in (ours, theirs)]
    if which == 0:
        assert_close(*(jax.vmap(derivative)(several) for derivative in derivatives))
    assert_close(*(derivative(of) for derivative in derivatives))


@pytest.mark.parametrize(
    ('strides', 'padding'), [((2, 2), ((0, 1), (0, 1))), ((1, 1), ((0, 0), (0, 0))), ((2, 2), 'SAME')]
)
def test_other_convolutions_are_left_to_jax(strides, padding):
    x, kernel, *_ = arrays(3)
    ours, theirs = both(strides, padding)
    np.testing.assert_array_equal(ours(x, kernel), theirs(x, kernel))


def test_precision_is_kept():
    x, kernel, gradient, *_ = (a.astype(jnp.bfloat16) for a in arrays(3))
    value, back = jax.vjp(both()[0], x, kernel)
    assert value.dtype == jnp.bfloat16 and {leaf.dtype for leaf in back(gradient)} == {jnp.dtype(jnp.bfloat16)}
