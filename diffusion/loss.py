"""The training loss: DDPM's L_simple, or the ELBO itself."""

import math

import jax
import jax.numpy as jnp

from diffusion import gaussian
from diffusion.likelihood.chain import compare, make_chain
from diffusion.likelihood.decoder import log_likelihood
from diffusion.likelihood.elbo import kl, prior_term


def loss(key, schedule, net, x0, *, kind, weighting='simple'):
    """One draw of the training loss of each image.

        'simple'   mean over pixels of (target − net(x_t, t))², t ~ Uniform{1 … T}, ε ~ N(0, I)      DDPM Eq. 14
        'vlb'      −𝓛 in bits/dim, DDPM Eq. 5: one of its T terms, times T, and the prior. The images of a
                   batch draw their terms evenly (u_i = u + i/B mod 1; VDM, arXiv:2107.00630, appendix I.1)

    Both are unbiased for each image. For 'vlb' the model's variance is β̃ ('small').

    key: typed PRNG key; net: (x_t (B, ...), t (B,)) → (B, ...), whose output is of `kind`
    ('eps' | 'x0' | 'v'); x0: (B, ...) in [−1, 1], for 'vlb' on the grid of 256 values.
    Returns (B,) float32. Raises ValueError for another weighting or kind.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f'weighting is {weighting!r}, but must be one of {", ".join(WEIGHTINGS)}')
    return WEIGHTINGS[weighting](key, schedule, net, x0, kind)


def _simple(key, schedule, net, x0, kind):
    level_key, noise_key = jax.random.split(key)
    t = jax.random.randint(level_key, x0.shape[:1], 1, schedule.T + 1)
    eps = jax.random.normal(noise_key, x0.shape)
    output = net(gaussian.q_sample(schedule, x0, t, eps), t)
    error = gaussian.target(schedule, kind, x0, t, eps) - output.astype(jnp.float32)
    return jnp.mean(error**2, axis=tuple(range(1, x0.ndim)))


def _vlb(key, schedule, net, x0, kind):
    chain = make_chain(schedule, net, kind=kind, variance='small', eta=1.0)
    level_key, noise_key = jax.random.split(key)
    u = jax.random.uniform(level_key) + jnp.arange(len(x0)) / len(x0)
    i = jnp.minimum(jnp.floor(u % 1 * schedule.T), schedule.T - 1).astype(jnp.int32)
    q, p = compare(chain, x0, jax.random.normal(noise_key, x0.shape), i)
    term = jnp.where(i == schedule.T - 1, log_likelihood(x0, *p), -kl(*q, *p))
    return -(schedule.T * term + prior_term(chain, x0)) / (math.log(2) * math.prod(x0.shape[1:]))


WEIGHTINGS = {'simple': _simple, 'vlb': _vlb}
