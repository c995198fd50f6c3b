"""Winograd's algorithms against the definition of a convolution in float64, with derivatives in both modes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks.cpu import conv as module
from diffusion.networks.cpu.conv import conv, winograd_p
from tests.xla_flags import FUSED, QUICK

HOW = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
ALGORITHMS = [*module.ALGORITHMS, 'whole']
ON_CPUS = pytest.mark.skipif(jax.default_backend() != 'cpu', reason='about XLA:CPU')
jit = functools.partial(jax.jit, compiler_options=QUICK)


def double(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


def halve(x):
    return sum(x[:, i::2, j::2] for i in range(2) for j in range(2))


def windows(x):
    """(i, j, what the kernel's place (i, j) sees of zero-padded images)."""
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    _, height, width, _ = x.shape
    return [(i, j, padded[:, i : i + height, j : j + width]) for i in range(3) for j in range(3)]


def direct(x, kernel, algorithm):
    """What the algorithm computes, as a sum over the places of the kernel."""
    y = sum(seen @ kernel[i, j] for i, j, seen in windows(double(x) if algorithm == 'doubled' else x))
    return halve(y) if algorithm == 'halved' else y


def direct_vjp(x, kernel, algorithm, gradient):
    """(gradient of x, gradient of the kernel) for a gradient of `direct`: its transposes."""
    x = double(x) if algorithm == 'doubled' else x
    gradient = double(gradient) if algorithm == 'halved' else gradient
    of_x = sum(seen @ kernel[2 - i, 2 - j].T for i, j, seen in windows(gradient))
    of_kernel = np.zeros_like(kernel)
    for i, j, seen in windows(x):
        of_kernel[i, j] = np.tensordot(seen, gradient, axes=([0, 1, 2], [0, 1, 2]))
    return halve(of_x) if algorithm == 'doubled' else of_x, of_kernel


def arrays(inputs=5, outputs=7, height=6, width=8, batch=3):
    """(x, kernel), and another (x, kernel), float64."""
    shapes = [(batch, height, width, inputs), (3, 3, inputs, outputs)]
    random = np.random.default_rng(0)
    return [random.normal(size=shape) for shape in shapes * 2]


def small(algorithm):
    """`arrays` of a size that the algorithm takes."""
    return arrays(height=4, width=4) if algorithm == 'whole' else arrays()


def bound(algorithm):
    return lambda x, kernel: winograd_p.bind(x, kernel, algorithm=algorithm)


def close(ours, theirs, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * float(np.abs(other).max()), rtol=0)


@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_values_and_derivatives_are_those_of_the_convolution(algorithm):
    x, kernel, dx, dkernel = small(algorithm)
    value = direct(x, kernel, algorithm)
    gradient = np.random.default_rng(1).normal(size=value.shape)
    forward = direct(dx, kernel, algorithm) + direct(x, dkernel, algorithm)

    @jit
    def results(x, kernel, dx, dkernel, gradient):
        value, vjp = jax.vjp(bound(algorithm), x, kernel)
        return value, vjp(gradient), jax.jvp(bound(algorithm), (x, kernel), (dx, dkernel))[1]

    found = results(*map(np.float32, (x, kernel, dx, dkernel, gradient)))
    close(found, (value, direct_vjp(x, kernel, algorithm, gradient), forward))


@pytest.mark.slow
@pytest.mark.parametrize('algorithm', ALGORITHMS)
@pytest.mark.parametrize('which', [0, 1])
def test_each_argument_alone_vectorized_and_twice(algorithm, which):
    """As the probability flow and second derivatives need it. In one argument a convolution is linear, a ↦ J·a."""
    arguments = small(algorithm)[:2]
    several = np.stack([arguments[which], 2 * arguments[which], arguments[which] - 1])

    def convolve(f, a):
        return f(*(a if i == which else arguments[i] for i in range(2)), algorithm)

    def normal(a):
        """JᵀJ·a."""
        pair = [a if i == which else arguments[i] for i in range(2)]
        return direct_vjp(*pair, algorithm, direct(*pair, algorithm))[which]

    @jit
    def results(several):
        def f(a):
            return bound(algorithm)(*(a if i == which else jnp.float32(arguments[i]) for i in range(2)))

        def square(a):
            return (f(a) ** 2).sum()

        derivative = jax.linearize(f, several[0])[1]
        twice = jax.grad(lambda a: (jax.grad(square)(a) ** 2).sum())(several[0])
        return jax.vmap(derivative)(several), jax.vmap(f)(several), jax.vmap(jax.grad(square))(several), twice

    values = np.stack([convolve(direct, a) for a in several])
    gradients = np.stack([2 * normal(a) for a in several])
    close(results(np.float32(several)), (values, values, gradients, 8 * normal(normal(several[0]))))


@pytest.mark.parametrize('algorithm, size, factor', [('same', 16, 3), ('whole', 4, 6)])
def test_rounding_is_little_more_than_that_of_a_convolution(algorithm, size, factor):
    """With channels of the CIFAR-10 network: values and both gradients, against float64."""
    x, kernel, *_ = arrays(256, 128, size, size, batch=64 // size)
    value = direct(x, kernel, algorithm)
    gradient = np.random.default_rng(1).normal(size=value.shape)
    exact = value, *direct_vjp(x, kernel, algorithm, gradient)

    def errors(f):
        def results(x, kernel, gradient):
            value, vjp = jax.vjp(f, x, kernel)
            return value, *vjp(gradient)

        found = jit(results)(*map(np.float32, (x, kernel, gradient)))
        return [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(found, exact, strict=True)]

    theirs = errors(lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', **HOW))
    for ours, of_convolution in zip(errors(bound(algorithm)), theirs, strict=True):
        assert ours < factor * of_convolution


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('algorithm', ALGORITHMS)
def test_an_image_that_is_not_finite_affects_no_other(algorithm, bad):
    x, kernel, *_ = (jnp.float32(a) for a in small(algorithm))

    @jit
    def results(x):
        value, vjp = jax.vjp(bound(algorithm), x, kernel)
        return value, vjp(value)[0]

    for found, expected in zip(results(x.at[0].set(bad)), results(x), strict=True):
        assert not np.isfinite(found[0]).any()
        np.testing.assert_array_equal(found[1:], expected[1:])


def primitives(f, *args):
    return {equation.primitive.name for equation in jax.make_jaxpr(f)(*args).eqns}


@pytest.mark.parametrize('doubled, channels, size', [(False, 128, 8), (False, 32, 14), (False, 32, 4), (True, 32, 8)])
def test_large_convolutions_are_winograds(doubled, channels, size):
    x, kernel, *_ = (jnp.float32(a) for a in arrays(channels, channels, size, size))

    def ours(x, kernel):
        return conv(x, kernel, (1, 1), 'SAME', doubled=doubled, **HOW)

    assert primitives(ours, x, kernel) == {'winograd'}
    close(jit(ours)(x, kernel), direct(np.asarray(x), np.asarray(kernel), 'doubled' if doubled else 'same'))


@pytest.mark.parametrize(
    'change',
    [
        {'strides': (2, 2), 'padding': ((0, 1), (0, 1))},
        {'padding': ((0, 0), (0, 0))},
        {'height': 7},
        {'height': 4},
        {'height': 4, 'width': 4, 'inputs': 24},
        {'height': 4, 'width': 4, 'outputs': 24},
        {'height': 4, 'width': 4, 'inputs': 256},
        {'height': 4, 'width': 4, 'outputs': 256},
        {'inputs': 3},
        {'outputs': 3},
        {'inputs': 64},
        {'outputs': 64},
        {'height': 14, 'width': 14, 'inputs': 24},
        {'height': 15, 'width': 15},
        {'inputs': 24, 'doubled': True},
        {'outputs': 24, 'doubled': True},
        {'width': 2, 'height': 2, 'doubled': True},
        {'dtype': jnp.bfloat16},
    ],
    ids=lambda change: '-'.join(change),
)
def test_other_convolutions_are_those_of_jax(change):
    size = {'height': 8, 'width': 8, 'inputs': 128, 'outputs': 128} | change
    how = {'strides': (1, 1), 'padding': 'SAME', 'dtype': jnp.float32} | change
    x, kernel, *_ = arrays(*(size[key] for key in ('inputs', 'outputs', 'height', 'width')))
    x, kernel = x.astype(how['dtype']), kernel.astype(how['dtype'])
    asked, doubled = (how['strides'], how['padding']), change.get('doubled', False)
    found = primitives(lambda x, kernel: conv(x, kernel, *asked, doubled=doubled, **HOW), x, kernel)
    assert 'winograd' not in found and 'conv_general_dilated' in found
    if not doubled:
        expected = jax.lax.conv_general_dilated(x, kernel, *asked, **HOW)
        np.testing.assert_array_equal(conv(x, kernel, *asked, **HOW), expected)


def test_convolutions_of_single_pixels_are_matrix_products():
    x, kernel, *_ = (jnp.float32(a) for a in arrays())
    kernel = kernel[1:2, 1:2]

    def ours(x, kernel, strides=(1, 1), padding='SAME'):
        return conv(x, kernel, strides, padding, **HOW)

    assert 'conv_general_dilated' not in primitives(ours, x, kernel)
    for how in [(1, 1), 'SAME'], [(2, 2), 'SAME'], [(1, 1), ((1, 1), (0, 2))]:
        np.testing.assert_allclose(
            ours(x, kernel, *how), jax.lax.conv_general_dilated(x, kernel, *how, **HOW), atol=1e-5
        )
    doubled = conv(x, kernel, (1, 1), 'SAME', doubled=True, **HOW)
    np.testing.assert_allclose(doubled, ours(x, kernel).repeat(2, axis=1).repeat(2, axis=2), atol=1e-5)


@pytest.mark.parametrize('size', [1, 3])
def test_an_empty_batch_gives_an_empty_batch(size):
    x, kernel, *_ = (jnp.float32(a) for a in arrays(32, 40, 4, 4))
    assert conv(x[:0], kernel[:size, :size], (1, 1), 'SAME', **HOW).shape == (0, 4, 4, 40)


@ON_CPUS
def test_images_are_computed_before_they_are_transposed():
    """XLA:CPU fuses both into a slow loop, in the forward and in the backward pass."""
    x, kernel, *_ = (jnp.float32(a) for a in arrays(32, 32, 4, 4))

    vjp = jax.vjp(lambda x: bound('whole')(x, kernel), x)[1]
    for f in lambda x: bound('whole')(jnp.exp(x), kernel), lambda gradient: vjp(jnp.exp(gradient)):
        pieces = jax.jit(f, compiler_options=FUSED).lower(x).compile().as_text().split('\n\n')
        computing = [piece for piece in pieces if ' exponential(' in piece and 'ENTRY' not in piece]
        assert computing and not any('[16,96]' in piece for piece in computing)


@ON_CPUS
@pytest.mark.parametrize('algorithm', module.ALGORITHMS)
def test_the_backward_pass_transposes_an_image_and_a_kernel_once(algorithm):
    """XLA:CPU would fuse the transposition into a slow loop for every product that uses it."""
    x, kernel, *_ = (jnp.float32(a) for a in arrays(8, 24, 8, 8))

    def loss(x, kernel):
        return (jnp.sin(bound(algorithm)(jnp.sin(x), kernel)) ** 2).sum()

    program = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile().as_text()
    transposed = re.findall(r'= (\S+?)\{\S* transpose\(', program)
    assert len(transposed) == len(set(transposed)) == 3  # the output's gradient, the kernel and its gradient
