"""Convolutions as CPUs compute them fastest, most by Winograd's algorithm (benchmarks/NOTES.md has the figures).

Along one axis, F(2, 3) gets two outputs of a kernel of three, y = Aᵀ[(G·k) ∘ (Bᵀ·d)], from four products instead of
six, where d is the four inputs that they see. Along both axes these are 16 instead of 36, each a matrix product of
all tiles' channels and a kernel's (Winograd 1980; Lavin and Gray, arXiv:1509.09308). Of an image that is doubled
first, as on the way up in a U-Net, d is (x_{i−1}, x_i, x_i, x_{i+1}): one of the four products is always 0, and 9 of
36 are left. The constants are ±½, ±1, ±2, and what is rounded stays within a small factor of what a convolution rounds.

Images of 4×4 pixels are one tile each of F(4, 3), with 36 products instead of 144, and rounding of two to five times
a convolution's. There Bᵀ, G and Aᵀ along both axes are a matrix product each, and so is all that derivatives need.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from diffusion.networks.order import after, apart


class Algorithm(NamedTuple):
    """The matrices of y = A[(G·k) ∘ (B·d)] along one axis; from one d to the next are `stride` inputs."""

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
    'doubled': Algorithm(  # each pixel stands for 2×2 of them
        b=np.array([[1, -1, 0], [0, 2, 0], [0, 1, -1]], np.float32),
        g=_G[[0, 1, 3]],
        a=np.array([[1, 1, 0], [0, 1, -1]], np.float32),
        stride=1,
    ),
    'halved': Algorithm(  # 2×2 outputs are added up
        b=_B[[0, 1, 3]],
        g=_G[[0, 1, 3]],
        a=np.array([[1, 2, -1]], np.float32),
        stride=2,
    ),
}
TRANSPOSED = {'same': 'same', 'doubled': 'halved', 'halved': 'doubled'}


def _toom_cook(points):
    """(B, G, A) of F(4, 3) along both axes, by values of polynomials at five points and at infinity (Toom, Cook)."""

    def values(coefficients):
        return np.array([[p**i for i in range(coefficients)] for p in points] + [[0] * (coefficients - 1) + [1]])

    b = np.linalg.inv(values(6)).T[:, 1:-1]  # the outermost inputs are the padding
    return [np.kron(m, m).astype(np.float32) for m in (b, values(3), values(4).T)]


WHOLE = _toom_cook((0, 2 / 3, -2 / 3, 3 / 2, -3 / 2))  # which round the least


def conv(x, kernel, strides, padding, *, doubled=False, **options):
    """jax.lax.conv_general_dilated of images (B, H, W, C) and a kernel (h, w, C, O), by Winograd where that is faster.

    doubled: each pixel of the images is repeated along both axes first.
    """
    if kernel.shape[:2] == strides == (1, 1) and padding == 'SAME' and not doubled:
        # As a matrix product, of which XLA's gradients are faster.
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])
    algorithm = _fastest(x, kernel, strides, padding, doubled)
    if algorithm:
        return winograd_p.bind(x, kernel, algorithm=algorithm)
    if doubled:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _fastest(x, kernel, strides, padding, doubled):
    """The algorithm that is faster than a convolution, or None. The number of images does not decide."""
    _, height, width, _ = x.shape
    if not (
        jax.default_backend() == 'cpu'
        and x.dtype == kernel.dtype == jnp.float32
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
    return 'same' if fewest >= 128 and height % 2 == width % 2 == 0 and height * width >= 64 else None


def winograd(x, kernel, *, algorithm):
    """The 3×3 convolution, padded by zeros, of images (B, H, W, C) with a kernel (3, 3, C, O)."""
    if algorithm == 'whole':
        return _whole(x, kernel)
    method = ALGORITHMS[algorithm]
    tiles = _combine(method.b, _tiles(_pad(x), method))
    kernels = _combine(method.g, kernel)
    products = _products('bhwc,co->bhwo', tiles, kernels)
    lines = [_interleave(line, axis=2) for line in _combine(method.a, products)]
    return _interleave(lines, axis=1)


def _image_gradient(gradient, x, kernel, *, algorithm):
    """Of winograd, likewise, of its images: the convolution with the kernel turned round."""
    if algorithm == 'whole':
        return _whole_image_gradient(gradient, kernel)
    turned = apart(lambda kernel: kernel[::-1, ::-1].swapaxes(2, 3), kernel)
    return winograd_p.bind(gradient, turned, algorithm=TRANSPOSED[algorithm])


def _kernel_gradient(gradient, x, kernel, *, algorithm):
    """Of winograd: what of its kernel has this gradient (B, ·, ·, O) of its output. Returns (3, 3, C, O)."""
    if algorithm == 'whole':
        return _whole_kernel_gradient(gradient, x)
    method = ALGORITHMS[algorithm]
    x = after(gradient[:, :1, :1, :1], x)  # nothing of this is done, and kept, before
    tiles = _combine(method.b, _tiles(_pad(x), method))
    # Products that sum over pixels are fastest of (O, pixels) and (pixels, C).
    phases = apart(lambda gradient: _phases(gradient, len(method.a)), gradient)
    products = _products('bhwc,obhw->oc', tiles, _combine(method.a.T, phases))
    return jnp.array(_combine(method.g.T, products)).swapaxes(2, 3)


def _phases(images, size):
    """Of each place in squares of size×size pixels, what all squares have there: a grid of arrays (C, B, ·, ·)."""
    batch, height, width, channels = images.shape
    squares = images.reshape(batch, height // size, size, width // size, size, channels)
    return squares.transpose(2, 4, 5, 0, 1, 3)


def _whole(x, kernel):
    """winograd of images that are one tile each. On the way back XLA has G·k and B·x from here."""
    b, g, a = WHOLE
    products = jnp.einsum('pbc,pco->pbo', _dot(b, _pixels(x)), _dot(g, _taps(kernel)))
    # XLA is slow where it computes an image and turns it round in one go. What has another use, it computes first.
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


def _combine(matrix, grid):
    """Σ_ij matrix[p, i]·matrix[q, j]·grid[i][j], for all p and q, as lists of lists."""

    def weighted(row, arrays):
        return functools.reduce(jnp.add, [weight * array for weight, array in zip(row, arrays, strict=True) if weight])

    lines = [[weighted(row, column) for column in zip(*grid, strict=True)] for row in matrix]
    return [[weighted(row, line) for row in matrix] for line in lines]


def _products(subscripts, one, other):
    """The einsum of each place of a grid with the same place of another."""
    return [
        [jnp.einsum(subscripts, *pair) for pair in zip(*lines, strict=True)] for lines in zip(one, other, strict=True)
    ]


def _pad(images):
    return jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _tiles(images, method):
    """Of each place in a tile, what all tiles have there: a grid of images."""
    size = method.b.shape[1]

    def take(images, i, axis):
        stop = images.shape[axis] - size + i + 1
        return jax.lax.slice_in_dim(images, i, stop, method.stride, axis)

    return [[take(take(images, i, axis=1), j, axis=2) for j in range(size)] for i in range(size)]


def _interleave(images, axis):
    """Row (or column) 0 of each image, then 1 of each, …."""
    shape = list(images[0].shape)
    shape[axis] *= len(images)
    return jnp.stack(images, axis + 1).reshape(shape)


def _vmap(args, dims, *, algorithm):
    return jax.vmap(functools.partial(winograd, algorithm=algorithm), dims)(*args), 0


# A primitive, and not a jax.custom_vjp, because likelihoods take derivatives forwards, many at a time.
winograd_p = Primitive('winograd')
winograd_p.def_impl(jax.jit(winograd, static_argnames='algorithm'))
winograd_p.def_abstract_eval(
    lambda x, kernel, *, algorithm: jax.typeof(
        jax.eval_shape(functools.partial(winograd, algorithm=algorithm), x, kernel)
    )
)
ad.defbilinear(winograd_p, _image_gradient, _kernel_gradient)
batching.primitive_batchers[winograd_p] = _vmap
mlir.register_lowering(winograd_p, mlir.lower_fun(winograd, multiple_results=False))
