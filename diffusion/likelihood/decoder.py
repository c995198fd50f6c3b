"""log p_θ(x_0 | x_1), the last step of the chain: the log-likelihood of pixels with discrete values."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float

from diffusion.gaussian import Images, require_images

Width = Float[Array, '...']  # broadcasts against the images

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
NODES, WEIGHTS = (a.astype(np.float32) for a in np.polynomial.legendre.leggauss(5))


def discretized(x0: Images, mean: Images, std: Width, bins: int) -> Images:
    """log ∫_{x−δ}^{x+δ} N(u; mean, std²) du, δ = 1/(bins−1), where the outermost bins are open (DDPM Eq. 13).

    Args:
        x0: (B, ...), in [−1, 1] on the grid of `bins` values.
        mean: (B, ...), of the Gaussian.
        std: its standard deviation, broadcasts against `mean`.
        bins: the number of values of a pixel.

    Returns:
        (B, ...) nats, the log-probability of each pixel.

    Raises:
        ValueError: x0 is outside [−1, 1], as far as that can be seen.
    """
    require_images(x0)
    # In units of half a bin the values are whole numbers, and neighbouring bins share exactly the same edge.
    level = jnp.round((x0 + 1) * (bins - 1) / 2)
    value, mean, std = 2 * level - (bins - 1), mean * (bins - 1), std * (bins - 1)
    lower, center, upper = ((value + offset - mean) / std for offset in (-1, 0, 1))
    return jnp.where(
        level == 0,
        log_ndtr(upper),
        jnp.where(level == bins - 1, log_ndtr(-lower), log_interval(lower, center, upper, 1 / std)),
    )


def gaussian(x0: Images, mean: Images, std: Width, bins: int) -> Images:
    """log N(x; mean, std²).

    Args:
        x0: (B, ...).
        mean: (B, ...), of the Gaussian.
        std: its standard deviation, broadcasts against `mean`.
        bins: not used.

    Returns:
        (B, ...) nats, the log-density of each pixel.
    """
    return -0.5 * ((x0 - mean) / std) ** 2 - LOG_SQRT_2PI - jnp.log(std)


DECODERS: dict[str, Callable[[Images, Images, Width, int], Images]] = {
    'discretized': discretized,
    'gaussian': gaussian,
}


def log_likelihood(
    x0: Images, mean: Images, std: Width, *, decoder: str = 'discretized', bins: int = 256
) -> Float[Array, 'B']:
    """log p(x_0) of each image under independent pixels around `mean`, summed over its pixels.

        'discretized'   log Π ∫_{x−δ}^{x+δ} N(u; mean, std²) du,  δ = 1/(bins−1), the outermost bins open   DDPM Eq. 13
        'gaussian'      log Π N(x; mean, std²)

    Args:
        x0: (B, ...), in [−1, 1]; for 'discretized' on the grid of `bins` values.
        mean: (B, ...), of the Gaussians.
        std: their standard deviation, broadcasts against `mean`.
        decoder: a key of `DECODERS`.
        bins: the number of values of a pixel.

    Returns:
        (B,) nats, of a probability, or of a density for 'gaussian'.

    Raises:
        ValueError: the decoder is unknown, or x0 is outside its range.
    """
    if decoder not in DECODERS:
        raise ValueError(f'decoder is {decoder!r}, but must be one of {", ".join(DECODERS)}')
    return per_image(DECODERS[decoder](x0, mean, std, bins))


def log_interval(lower: Images, center: Images, upper: Images, half: Width) -> Images:
    """log Pr(lower < z < upper) for z ~ N(0, 1), accurate for narrow intervals and in the far tails.

    Narrow intervals are integrated by Gauss–Legendre quadrature, because the difference of two cumulative
    probabilities would lose all its digits. Wide ones are that difference, taken in the tail where both are small.

    Args:
        lower: (B, ...), center − half.
        center: (B, ...).
        upper: (B, ...), center + half.
        half: half the width, positive, broadcasts against `center`.

    Returns:
        (B, ...) nats.
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


def per_image(values: Images) -> Float[Array, 'B']:
    """Sum over all axes but the first: (B, ...) -> (B,)."""
    return values.sum(axis=tuple(range(1, values.ndim)))
