"""The training loss."""

import jax
import jax.numpy as jnp

from diffusion import gaussian


def loss(key, schedule, net, x0, *, kind, weighting='simple'):
    """One draw of the training loss of each image, t ~ Uniform{1 … T}, ε ~ N(0, I).

        'simple'    mean over pixels of (target − net(x_t, t))²                        DDPM Eq. 14

    key: typed PRNG key; net: (x_t (B, ...), t (B,)) → (B, ...), whose output is of `kind`
    ('eps' | 'x0' | 'v'); x0: (B, ...) in [−1, 1].
    Returns (B,) float32. Raises ValueError for another weighting or kind.
    """
    if weighting != 'simple':
        raise ValueError(f"weighting is {weighting!r}, but must be 'simple'")
    level_key, noise_key = jax.random.split(key)
    t = jax.random.randint(level_key, x0.shape[:1], 1, schedule.T + 1)
    eps = jax.random.normal(noise_key, x0.shape)
    output = net(gaussian.q_sample(schedule, x0, t, eps), t)
    error = gaussian.target(schedule, kind, x0, t, eps) - output.astype(jnp.float32)
    return jnp.mean(error**2, axis=tuple(range(1, x0.ndim)))
