"""log p_θ(x_0 | x_1): what the last step of the chain says of pixels that are whole numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

DECODERS = ('discretized', 'gaussian')
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
NODES, WEIGHTS = (a.astype(np.float32) for a in np.polynomial.legendre.leggauss(5))


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
        # In units of half a bin the values are whole numbers, and neighbours agree on their edge to the last digit.
        level = jnp.round((x0 + 1) * (bins - 1) / 2)
        value, mean, std = 2 * level - (bins - 1), mean * (bins - 1), std * (bins - 1)
        lower, center, upper = ((value + offset - mean) / std for offset in (-1, 0, 1))
        logs = jnp.where(
            level == 0,
            log_ndtr(upper),
            jnp.where(level == bins - 1, log_ndtr(-lower), log_interval(lower, center, upper, 1 / std)),
        )
    else:
        raise ValueError(f'decoder is {decoder!r}, but must be one of {", ".join(DECODERS)}')
    return per_image(logs)


def log_interval(lower, center, upper, half):
    """log Pr(lower < z < upper) for z ~ N(0, 1); lower and upper are center ∓ half.

    Narrow intervals are integrated by Gauss and Legendre's rule: the difference of two cumulative
    probabilities would lose all its digits. Wide ones are that difference, taken on the side where both
    are small.
    """
    distance = jnp.abs(center)
    narrow = (half < 0.5) & (distance * half < 2)

    half = jnp.broadcast_to(half, center.shape)
    z = jnp.where(narrow, distance, 0)[..., None] + half[..., None] * NODES
    log_mean_density = jax.nn.logsumexp(-0.5 * z**2, axis=-1, b=WEIGHTS / 2) - LOG_SQRT_2PI

    far = log_ndtr(jnp.where(center > 0, -upper, lower))
    near = log_ndtr(jnp.where(center > 0, -lower, upper))
    log_difference = near + jnp.log1p(-jnp.exp(jnp.where(narrow, -1, far - near)))

    return jnp.where(narrow, log_mean_density + jnp.log(2 * half), log_difference)


def per_image(values):
    """Sum over all axes but the first: (B, ...) → (B,)."""
    return values.sum(axis=tuple(range(1, values.ndim)))
