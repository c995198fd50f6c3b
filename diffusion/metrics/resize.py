"""How images become the input of a feature network: resizing and range, in the dialects of the tools that define FID.

All of these resizings are linear and treat rows and columns alike, so each is two products with one matrix.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

Matrix = Float[np.ndarray, 'out size']


def tensorflow1(size: int, out: int) -> Matrix:
    """Return the matrix of TensorFlow 1's bilinear resizing: output i lies at i·size/out, without antialiasing.

    The positions are rounded to float32, as TensorFlow rounds them.
    """
    return _two_taps(np.arange(out, dtype=np.float32) * np.float32(size / out), size)


def half_pixel(size: int, out: int) -> Matrix:
    """Return the matrix of PyTorch's bilinear resizing: output i lies at (i + ½)·size/out − ½, without antialiasing.

    The ratio of the sizes and the positions are rounded to float32, as PyTorch rounds them.
    """
    positions = (np.arange(out) + 0.5) * float(np.float32(size / out)) - 0.5
    return _two_taps(np.maximum(positions, 0).astype(np.float32), size)


def bicubic(size: int, out: int) -> Matrix:
    """Return the matrix of Pillow's bicubic resizing (a = −½), which is antialiased when it shrinks."""
    scale = size / out
    stretch = max(scale, 1.0)
    matrix = np.zeros((out, size))
    for i in range(out):
        center = (i + 0.5) * scale
        first, last = (int(np.clip(edge, 0, size)) for edge in (center - 2 * stretch + 0.5, center + 2 * stretch + 0.5))
        taps = cubic((np.arange(first, last) - center + 0.5) / stretch, -0.5)
        matrix[i, first:last] = taps / taps.sum()
    return matrix


def cubic(x: Float[np.ndarray, 'N'], a: float) -> Float[np.ndarray, 'N']:
    """Return the kernel of bicubic interpolation at distances of x pixels (Keys 1981)."""
    x = np.abs(x)
    return np.where(x < 1, ((a + 2) * x - (a + 3)) * x * x + 1, np.where(x < 2, a * (((x - 5) * x + 8) * x - 4), 0))


def _two_taps(positions: Float32[np.ndarray, 'out'], size: int) -> Matrix:
    """Return the matrix that interpolates linearly at each position; beyond the last pixel it repeats that pixel."""
    low = positions.astype(np.int64)
    fraction = positions - low.astype(np.float32)
    matrix = np.zeros((len(positions), size), np.float32)
    rows = np.arange(len(positions))
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, np.minimum(low + 1, size - 1)), fraction)
    return matrix


class Dialect(NamedTuple):
    """How images in 0 … 255 are preprocessed for a network.

    Attributes:
        matrix: (size, out) → the matrix (out, size) that resizes rows and columns.
        to_range: maps resized values in 0 … 255 to the range that the network expects.
        of_bytes: whether columns and then rows are rounded to bytes, as Pillow does it with bytes.
    """

    matrix: Callable[[int, int], Matrix]
    to_range: Callable[[Float32[Array, '...']], Float32[Array, '...']]
    of_bytes: bool = False


def _imagenet(x):
    """Subtract the mean of ImageNet's pixels, and divide by their standard deviation."""
    mean, std = jnp.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], jnp.float32)
    return (x / 255 - mean) / std


_LEGACY = Dialect(tensorflow1, lambda x: (x - 128) / 128)

# ADM's evaluator and torch-fidelity resize alike, but define the Inception score differently. dgm-eval is the code of
# the paper on FD-DINOv2; edm2 is that of EDM2, which computes in floating point.
DIALECTS = {
    'adm': _LEGACY,
    'torch-fidelity': _LEGACY,
    'pytorch-fid': Dialect(half_pixel, lambda x: 2 * (x / 255) - 1),
    'clean-fid': Dialect(bicubic, lambda x: (jnp.clip(x, 0, 255) - 128) / 128),
    'dgm-eval': Dialect(bicubic, _imagenet, of_bytes=True),
    'edm2': Dialect(bicubic, _imagenet),
}
OF_INCEPTION = ('adm', 'torch-fidelity', 'pytorch-fid', 'clean-fid')
OF_DINOV2 = ('dgm-eval', 'edm2')
# EfficientNet-Lite's own input range (x − 127)/128, after the same resizing as clean-fid's.
EFFICIENTNET = Dialect(bicubic, lambda x: (jnp.clip(x, 0, 255) - 127) / 128)


def preprocess(images: UInt8[Array, 'N H W C'], dialect: Dialect, out: int) -> Float32[Array, 'N out out 3']:
    """Resize images to out × out, and map them to the range that a network expects.

    Args:
        images: (N, H, W, 1 or 3), in 0 … 255; grey is repeated in three channels.
        dialect: how.
        out: height and width of the result, in pixels.

    Returns:
        (N, out, out, 3) float32. An image of the size `out` is not resampled.

    Raises:
        ValueError: the images have neither one nor three channels.
    """
    height, width, channels = images.shape[1:]
    if channels not in (1, 3):
        raise ValueError(f'images have {channels} channels, but feature networks take 1 or 3')
    rows, columns = (_matrix(dialect.matrix, size, out) for size in (height, width))
    product = _bytes_product if dialect.of_bytes else _product
    # Columns first, as Pillow does.
    resized = product('hi,nijc->nhjc', rows, product('wj,nijc->niwc', columns, images)).astype(jnp.float32)
    return dialect.to_range(jnp.broadcast_to(resized, (*resized.shape[:3], 3)))


def _product(indices, matrix, images):
    return jnp.einsum(indices, np.float32(matrix), images.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _bytes_product(indices, matrix, images):
    """The product in Pillow's fixed point of 22 bits, rounded and limited to 0 … 255; int32."""
    fixed = np.round(matrix * 2**22).astype(np.int32)
    return jnp.clip((jnp.einsum(indices, fixed, images.astype(jnp.int32)) + 2**21) >> 22, 0, 255)


@functools.cache
def _matrix(function: Callable[[int, int], Matrix], size: int, out: int) -> Matrix:
    return function(size, out)
