"""log p_θ(x_0 | x_1): what the last step of the chain says of pixels that are whole numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np

DECODERS = ('discretized', 'gaussian')
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
NODES, WEIGHTS = (jnp.asarray(a, jnp.float32) for a in np.polynomial.legendre.leggauss(5))


def log_likelihood(x0, mean, std, *, decoder='discretized', bins=256):
    """log p(x_0) of each image under independent pixels around `mean`, summed over its pixels.

        'discretized'   Π ∫_{x−δ}^{x+δ} N(u; mean, std²) du,  δ = 1/(bins−1), the outermost bins open   DDPM Eq. 13
        'gaussian'      Π N(x; mean, std²)

    x0: (B, ...) in [−1, 1], for 'discretized' on the grid of `bins` values; mean: (B, ...); std:
    broadcasts against it. Returns (B,) nats: of a probability, or of a density for 'gaussian'.
    Raises ValueError for another decoder.
    """
    if decoder == 'gaussian':
        logs = -0.5 * ((x0 - mean) / std) ** 2 - LOG_SQRT_2PI - jnp.log(std)
    elif decoder == 'discretized':
        logs = log_bin((x0 - mean) / std, 1 / (std * (bins - 1)), lowest=x0 < -1 + 1 / bins, highest=x0 > 1 - 1 / bins)
    else:
        raise ValueError(f'decoder is {decoder!r}, but must be one of {", ".join(DECODERS)}')
    return per_image(logs)


def log_bin(center, half, *, lowest, highest):
    """log Pr(|z − center| < half) for z ~ N(0, 1); the bin goes on for ever downwards or upwards at the ends.

    Narrow bins are integrated by Gauss and Legendre's rule: the difference of two cumulative
    probabilities would lose all its digits. Wide ones are that difference, taken on the side where both
    are small.
    """
    half = jnp.broadcast_to(half, center.shape)
    center = jnp.where(lowest, -center, center)  # an open end below is one above, mirrored
    open_end = jax.scipy.special.log_ndtr(half - center)  # of (center − half, ∞), but for `lowest` mirrored
    far = jnp.abs(center)
    narrow = (half < 0.5) & (far * half < 2)

    z = jnp.where(narrow, far, 0)[..., None] + half[..., None] * NODES
    inner_narrow = jax.nn.logsumexp(-0.5 * z**2, axis=-1, b=WEIGHTS / 2) + jnp.log(2 * half) - LOG_SQRT_2PI

    near_edge = jax.scipy.special.log_ndtr(half - far)
    far_edge = jax.scipy.special.log_ndtr(-half - far)
    ratio = jnp.where(narrow, -1, far_edge - near_edge)
    inner_wide = near_edge + jnp.log1p(-jnp.exp(ratio))

    return jnp.where(lowest | highest, open_end, jnp.where(narrow, inner_narrow, inner_wide))


def per_image(values):
    """Sum over all axes but the first: (B, ...) → (B,)."""
    return values.sum(axis=tuple(range(1, values.ndim)))
