"""The training loss: DDPM's L_simple, or the ELBO itself."""

import math

import jax
import jax.numpy as jnp

from diffusion import gaussian
from diffusion.likelihood.chain import compare, make_chain
from diffusion.likelihood.decoder import log_likelihood
from diffusion.likelihood.elbo import kl, prior_term


def loss(key, schedule, net, x0, *, kind, weighting='simple'):
    """One draw of the training loss of each image: `loss_at` the levels and the noise of `draw`.

    key: typed PRNG key; the other arguments as in `loss_at`. Returns (B,) float32.
    """
    t, eps = draw(key, schedule.T, x0.shape, weighting=weighting)
    return loss_at(schedule, net, x0, t, eps, kind=kind, weighting=weighting)


def draw(key, T, shape, *, weighting):
    """The noise levels t (B,), each in 1 … T and of equal chances, and the noise ε (B, ...) for images of a shape.

    For 'simple' the levels are independent; for 'vlb' the images of a batch draw them evenly
    (u_i = u + i/B mod 1; VDM, arXiv:2107.00630, appendix I.1). Raises ValueError for another weighting.
    """
    check(weighting)
    level_key, noise_key = jax.random.split(key)
    if weighting == 'simple':
        t = jax.random.randint(level_key, shape[:1], 1, T + 1)
    else:
        u = jax.random.uniform(level_key) + jnp.arange(shape[0]) / shape[0]
        t = T - jnp.minimum(jnp.floor(u % 1 * T), T - 1).astype(jnp.int32)
    return t, jax.random.normal(noise_key, shape)


def loss_at(schedule, net, x0, t, eps, *, kind, weighting):
    """The training loss of each image at x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε.

        'simple'   mean over pixels of (target − net(x_t, t))²                                    DDPM Eq. 14
        'vlb'      −𝓛 in bits/dim, DDPM Eq. 5: the term of level t times T, and the prior

    Over `draw` both are unbiased for each image. For 'vlb' the model's variance is β̃ ('small').

    net: (x_t (B, ...), t (B,)) → (B, ...), whose output is of `kind` ('eps' | 'x0' | 'v'); x0: (B, ...) in [−1, 1], for
    'vlb' on the grid of 256 values; t: (B,) int; eps: (B, ...).
    Returns (B,) float32. Raises ValueError for another weighting or kind.
    """
    check(weighting)
    return WEIGHTINGS[weighting](schedule, net, x0, t, eps, kind)


def check(weighting):
    """Raise ValueError for what is no weighting."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f'weighting is {weighting!r}, but must be one of {", ".join(WEIGHTINGS)}')


def _simple(schedule, net, x0, t, eps, kind):
    output = net(gaussian.q_sample(schedule, x0, t, eps), t)
    error = gaussian.target(schedule, kind, x0, t, eps) - output.astype(jnp.float32)
    return jnp.mean(error**2, axis=tuple(range(1, x0.ndim)))


def _vlb(schedule, net, x0, t, eps, kind):
    chain = make_chain(schedule, net, kind=kind, variance='small', eta=1.0)
    q, p = compare(chain, x0, eps, schedule.T - t)
    term = jnp.where(t == 1, log_likelihood(x0, *p), -kl(*q, *p))
    return -(schedule.T * term + prior_term(chain, x0)) / (math.log(2) * math.prod(x0.shape[1:]))


WEIGHTINGS = {'simple': _simple, 'vlb': _vlb}
