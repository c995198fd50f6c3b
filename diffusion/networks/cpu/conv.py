"""Convolutions by the algorithm that is fastest on CPUs, mostly Winograd's (benchmarks/NOTES.md has the figures).

F(2, 3) computes two outputs of a kernel of size three along one axis by four products instead of six:
y = Aᵀ[(G·k) ∘ (Bᵀ·d)], where d is the tile of four inputs. Along both axes it takes 16 products instead of 36, each of
them a matrix product over the channels for all tiles at once (Winograd 1980; Lavin and Gray 2015, arXiv:1509.09308).
If each pixel of the image is repeated first, as in the decoder of a U-Net, d is (x_{i−1}, x_i, x_i, x_{i+1}): one of
the four products is always 0, and 9 of 36 remain. The constants are ±½, ±1 and ±2, so that rounding stays close to
that of a direct convolution.

An image of 4×4 pixels is one tile of F(4, 3), with 36 products instead of 144. Here the transforms along both axes,
and all derivatives, are matrix products. Rounding is two to five times that of a direct convolution.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Float

from diffusion.networks.cpu.order import after, apart


class Algorithm(NamedTuple):
    """The matrices of y = a[(g·k) ∘ (b·d)] along one axis. Consecutive tiles d are `stride` inputs apart."""

    b: np.ndarray
    g: np.ndarray
    a: np.ndarray
    stride: int


_B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
ALGORITHMS = {
    'same': Algorithm(
        b=_B,
        g=_G,
        a=np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32),
        stride=2,
    ),
    'doubled': Algorithm(  # each pixel is repeated 2×2 times before the convolution
        b=np.array([[1, -1, 0], [0, 2, 0], [0, 1, -1]], np.float32),
        g=_G[[0, 1, 3]],
        a=np.array([[1, 1, 0], [0, 1, -1]], np.float32),
        stride=1,
    ),
    'halved': Algorithm(  # 2×2 outputs are added after the convolution
        b=_B[[0, 1, 3]],
        g=_G[[0, 1, 3]],
        a=np.array([[1, 2, -1]], np.float32),
        stride=2,
    ),
}
TRANSPOSED = {'same': 'same', 'doubled': 'halved', 'halved': 'doubled'}


def _toom_cook(points):
    """(B, G, A) of F(4, 3) along both axes, by the values of polynomials at five points and at infinity (Toom–Cook)."""

    def values(coefficients):
        return np.array([[p**i for i in range(coefficients)] for p in points] + [[0] * (coefficients - 1) + [1]])

    b = np.linalg.inv(values(6)).T[:, 1:-1]  # the outermost inputs are padding
    return [np.kron(m, m).astype(np.float32) for m in (b, values(3), values(4).T)]


WHOLE = _toom_cook((0, 2 / 3, -2 / 3, 3 / 2, -3 / 2))  # these points round the least


def conv(
    x: Float[Array, 'B H W C'],
    kernel: Float[Array, 'h w C O'],
    strides: tuple[int, int],
    padding: Any,
    *,
    doubled: bool = False,
    **options: Any,
) -> Float[Array, 'B ...']:
    """Convolve as jax.lax.conv_general_dilated does, by Winograd's algorithm if it is faster.

    Args:
        x: images.
        kernel: the kernel.
        strides: along H and W.
        padding: see jax.lax.conv_general_dilated.
        doubled: whether each pixel of x is repeated 2×2 times before the convolution.
        **options: other arguments of jax.lax.conv_general_dilated.

    Returns:
        Images with O channels.
    """
    if kernel.shape[:2] == strides == (1, 1) and padding == 'SAME' and not doubled:
        # A matrix product, because XLA computes the kernel's gradient by a slow convolution with windows of H×W.
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])
    algorithm = _fastest(x, kernel, strides, padding, doubled)
    if algorithm:
        return winograd_p.bind(x, kernel, algorithm=algorithm)
    if doubled:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _fastest(x, kernel, strides, padding, doubled):
    """The algorithm that is faster than a direct convolution, or None. It does not depend on the batch size."""
    _, height, width, _ = x.shape
    if not (
        x.dtype == kernel.dtype == jnp.float32
        and kernel.shape[:2] == (3, 3)
        and set(strides) == {1}
        and padding == 'SAME'
    ):
        return None
    fewest, most = sorted(kernel.shape[2:])
    if doubled:
        return 'doubled' if fewest >= 32 and height * width >= 16 else None
    if height == width == 4:
        return 'whole' if fewest >= 32 and most <= 128 else None
    if fewest < 32 or height % 2 or width % 2:
        return None
    least = 64 if fewest >= 128 else 196  # pixels; with fewer channels, it takes more to outweigh the transforms
    return 'same' if height * width >= least else None


def winograd(x: Float[Array, 'B H W C'], kernel: Float[Array, '3 3 C O'], *, algorithm: str) -> Float[Array, 'B ...']:
    """Convolve zero-padded images: `algorithm` is a key of ALGORITHMS, or 'whole' for images of 4×4 pixels."""
    if algorithm == 'whole':
        return _whole(x, kernel)
    method = ALGORITHMS[algorithm]
    tiles = _transform(method.b, _tiles(_pad(x), method))
    kernels = _transform(method.g, kernel)
    products = _products('bhwc,co->bhwo', tiles, kernels)
    rows = [_interleave(row, axis=2) for row in _transform(method.a, products)]
    return _interleave(rows, axis=1)


def _image_gradient(gradient, x, kernel, *, algorithm):
    """The vector-Jacobian product of `winograd` for x: a convolution with the flipped kernel."""
    if algorithm == 'whole':
        return _whole_image_gradient(gradient, kernel)
    flipped = apart(lambda kernel: kernel[::-1, ::-1].swapaxes(2, 3), kernel)
    return winograd_p.bind(gradient, flipped, algorithm=TRANSPOSED[algorithm])


def _kernel_gradient(gradient, x, kernel, *, algorithm):
    """The vector-Jacobian product of `winograd` for the kernel."""
    if algorithm == 'whole':
        return _whole_kernel_gradient(gradient, x)
    method = ALGORITHMS[algorithm]
    x = after(gradient[:, :1, :1, :1], x)  # else XLA transforms the tiles early, and keeps them
    tiles = _transform(method.b, _tiles(_pad(x), method))
    # Products that sum over pixels are fastest as (O, pixels)·(pixels, C).
    phases = apart(lambda gradient: _phases(gradient, len(method.a)), gradient)
    products = _products('bhwc,obhw->oc', tiles, _transform(method.a.T, phases))
    return jnp.array(_transform(method.g.T, products)).swapaxes(2, 3)


def _phases(images, size):
    """Divide images into squares of size×size pixels: [i][j] is pixel (i, j) of all squares, (C, B, ·, ·)."""
    batch, height, width, channels = images.shape
    squares = images.reshape(batch, height // size, size, width // size, size, channels)
    return squares.transpose(2, 4, 5, 0, 1, 3)


def _whole(x, kernel):
    """`winograd` of images that are one tile each."""
    b, g, a = WHOLE
    products = jnp.einsum('pbc,pco->pbo', _dot(b, _pixels(x)), _dot(g, _taps(kernel)))
    # XLA:CPU fuses the products with their transposition into a slow loop, unless they have a second use.
    return after(x[:, :1, :1, :1], _images(_dot(a, products)))


def _whole_image_gradient(gradient, kernel):
    b, g, a = WHOLE
    products = jnp.einsum('pbo,pco->pbc', _dot(a.T, _pixels(gradient)), _dot(g, _taps(kernel)))
    return after(gradient[:, :1, :1, :1], _images(_dot(b.T, products)))


def _whole_kernel_gradient(gradient, x):
    b, g, a = WHOLE
    products = jnp.einsum('pbc,pbo->pco', _dot(b, _pixels(x)), _dot(a.T, _pixels(gradient)))
    return _dot(g.T, products).reshape(3, 3, *products.shape[1:])


_dot = functools.partial(jnp.tensordot, axes=1)


def _pixels(images):
    """(B, 4, 4, C) → (16, B, C)."""
    return images.reshape(len(images), 16, images.shape[-1]).swapaxes(0, 1)


def _images(pixels):
    """(16, B, C) → (B, 4, 4, C)."""
    return pixels.swapaxes(0, 1).reshape(pixels.shape[1], 4, 4, pixels.shape[2])


def _taps(kernel):
    """(3, 3, C, O) → (9, C, O)."""
    return kernel.reshape(9, *kernel.shape[2:])


def _transform(matrix, grid):
    """Σ_ij matrix[p, i]·matrix[q, j]·grid[i][j] for all p and q, as lists of lists."""

    def weighted(row, arrays):
        return functools.reduce(jnp.add, [weight * array for weight, array in zip(row, arrays, strict=True) if weight])

    lines = [[weighted(row, column) for column in zip(*grid, strict=True)] for row in matrix]
    return [[weighted(row, line) for row in matrix] for line in lines]


def _products(subscripts, one, other):
    """The einsum of each element of a grid with the same element of another."""
    return [
        [jnp.einsum(subscripts, *pair) for pair in zip(*lines, strict=True)] for lines in zip(one, other, strict=True)
    ]


def _pad(images):
    return jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _tiles(images, method):
    """Divide images into overlapping tiles: [i][j] is pixel (i, j) of all tiles, as images."""
    size = method.b.shape[1]

    def take(images, i, axis):
        stop = images.shape[axis] - size + i + 1
        return jax.lax.slice_in_dim(images, i, stop, method.stride, axis)

    return [[take(take(images, i, axis=1), j, axis=2) for j in range(size)] for i in range(size)]


def _interleave(images, axis):
    """Row (or column) 0 of each image, then row 1 of each, and so on."""
    shape = list(images[0].shape)
    shape[axis] *= len(images)
    return jnp.stack(images, axis + 1).reshape(shape)


def _abstract(x, kernel, *, algorithm):
    """The shape of the result."""
    batch, height, width, _ = x.shape
    if algorithm != 'whole':
        outputs, inputs = len(ALGORITHMS[algorithm].a), ALGORITHMS[algorithm].stride  # of a tile, along one axis
        height, width = height * outputs // inputs, width * outputs // inputs
    return x.update(shape=(batch, height, width, kernel.shape[-1]))


def _vmap(args, dims, *, algorithm):
    return jax.vmap(functools.partial(winograd, algorithm=algorithm), dims)(*args), 0


# A primitive instead of a jax.custom_vjp, because likelihoods need forward-mode derivatives and vmap.
winograd_p = Primitive('winograd')
winograd_p.def_impl(jax.jit(winograd, static_argnames='algorithm'))
winograd_p.def_abstract_eval(_abstract)
ad.defbilinear(winograd_p, _image_gradient, _kernel_gradient)
batching.primitive_batchers[winograd_p] = _vmap
mlir.register_lowering(winograd_p, mlir.lower_fun(winograd, multiple_results=False))
