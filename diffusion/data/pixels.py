"""Convert images between the levels 0 … 255 of files and the range [−1, 1] of networks."""

import numpy as np
from jax import Array
from jaxtyping import Float, Float32, UInt8


def to_float(images: UInt8[Array | np.ndarray, '*shape']) -> Float32[Array | np.ndarray, '*shape']:
    """Map levels to [−1, 1]: x = u/127.5 − 1 (DDPM §3.3).

    Args:
        images: uint8 of any shape, in 0 … 255.

    Returns:
        float32 of the same shape, in [−1, 1].
    """
    return images / np.float32(127.5) - np.float32(1)


def to_uint8(images: Float[Array | np.ndarray, '*shape']) -> UInt8[np.ndarray, '*shape']:
    """Map [−1, 1] to the nearest level; truncation would darken images by half a level.

    Args:
        images: real numbers of any shape; those outside [−1, 1] are clipped.

    Returns:
        uint8 of the same shape, in 0 … 255.
    """
    return np.round(np.clip((np.asarray(images) + 1) * 127.5, 0, 255)).astype(np.uint8)
