"""Convolutions as CPUs compute them fastest: XLA leaves them half of what it could have there (benchmarks/NOTES.md)."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call


def conv_general_dilated(x, kernel, strides, padding, **options):
    """jax.lax.conv_general_dilated, of images (B, H, W, C) with a kernel (k, k, C, O).

    On a lone CPU, where the strides are 1, a 1×1 convolution is a matrix product, and the gradient of a larger kernel
    is one for each of its places. XLA makes that gradient a convolution with windows as large as the image, which takes
    up to twice as long. With several devices it stays one, for they would reduce each place's gradient on its own.
    """
    lone_cpu = jax.default_backend() == 'cpu' and jax.device_count() == 1
    if not lone_cpu or set(strides) != {1} or padding != 'SAME' or kernel.shape[0] % 2 == 0:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    if kernel.shape[:2] == (1, 1):
        return jnp.einsum('bhwc,co->bhwo', x, kernel[0, 0])
    return _conv(x, kernel)


@jax.custom_jvp
def _conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


@functools.partial(_conv.defjvp, symbolic_zeros=True)
def _conv_jvp(primals, tangents):
    x, kernel = primals
    of_x, of_kernel = tangents
    parts = []
    if not isinstance(of_x, SymbolicZero):
        parts.append(_conv(of_x, kernel))
    if not isinstance(of_kernel, SymbolicZero):
        parts.append(linear_call(_conv, functools.partial(_kernel_gradient, kernel.shape), x, of_kernel))
    return _conv(x, kernel), functools.reduce(jnp.add, parts)


def _kernel_gradient(shape, x, gradient):
    """For each place of the kernel, Σ over pixels of gradient · what that place has seen: (k, k, C, O)."""
    size, (_, height, width, _) = shape[0], x.shape
    around = (size // 2, size // 2)
    x += 0 * gradient[:, :1, :1, :1]  # so that nothing of this is done, and kept, before the gradient is there
    x = jnp.pad(x, ((0, 0), around, around, (0, 0)))
    seen = [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    products = [jnp.einsum('bhwo,bhwc->oc', gradient, part) for part in seen]  # twice as fast as to (c, o)
    return jnp.stack(products).swapaxes(1, 2).reshape(shape)
