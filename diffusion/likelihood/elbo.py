"""The evidence lower bound, in the three forms of the derivation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import gaussian
from diffusion.likelihood.chain import compare, forward, log_ratio, make_chain, reconstruction
from diffusion.likelihood.decoder import per_image

FORMS = ('posterior', 'transition', 'printed')


class Terms(NamedTuple):
    """Contributions to 𝓛 in nats; their sum is the bound (not for the form 'printed')."""

    reconstruction: jax.Array  # (B,)
    prior: jax.Array  # (B,)
    consistency: jax.Array  # (B, n_levels), the noisiest first

    def total(self):
        """𝓛 of each image: (B,) nats."""
        return self.reconstruction + self.prior + self.consistency.sum(axis=1)

    def standard_error(self):
        """Of the sum of consistency terms of each image, for its draws of levels and noise: (B,) nats.

        √Σ_j (y_2j − y_2j+1)², over pairs of neighbouring terms (of an odd number the last counts with the one
        before): strata are collapsed in twos, so the error is never too small in expectation, and too large by as
        much as neighbouring terms differ in the mean (Cochran, Sampling Techniques, §5A.12). NaN for a single term.
        """
        y = self.consistency
        if y.shape[1] < 2:
            return jnp.full(y.shape[:1], jnp.nan)
        half = y.shape[1] // 2
        squares = ((y[:, : 2 * half : 2] - y[:, 1 : 2 * half : 2]) ** 2).sum(axis=1)
        return jnp.sqrt(squares + (y[:, -1] - y[:, -2]) ** 2 * (y.shape[1] % 2))


def elbo(
    key,
    schedule,
    net,
    x0,
    *,
    kind,
    form='posterior',
    decoder='discretized',
    variance='small',
    eta=1.0,
    timesteps=None,
    levels=None,
    clip=False,
    bins=256,
):
    """One draw of the terms of 𝓛 ≤ log p(x_0) for each image; the expectation of their sum is the bound.

    For a chain of pairs (t, s), whose first t is called T and last t is called 1, and r the level below s:

        reconstruction   E_{q(x_1|x_0)} log p(x_0|x_1), in all forms

        'posterior'      DDPM Eq. 5, what everyone trains
            prior        −KL( q(x_T|x_0) ‖ N(0, I) )
            consistency  −E_{q(x_t|x_0)} KL( q_σ(x_s|x_t,x_0) ‖ p(x_s|x_t) )
        'transition'     Eq. (8) of the derivation: the same in expectation, with far more variance
            prior        E log N(x_T; 0, I)/q(x_T|x_{T−1})
            consistency  E log p(x_s|x_t)/q(x_s|x_r)
        'printed'        Eq. (9) as tutorials print it, which is *not* 𝓛
            prior        −E KL( q(x_T|x_{T−1}) ‖ N(0, I) )
            consistency  −E_{q(x_r,x_t|x_0)} KL( q(x_s|x_r) ‖ p(x_s|x_t) ), wrong: it takes x_s and x_t for
                         independent given x_r, but x_t is made from x_s

    one consistency term for each pair with s > 0. For η < 1 q(x_s|x_r) is that of DDIM's family, given x_0.

    key: typed PRNG key; net: (x_t (B, ...), t (B,)) → (B, ...), its output of `kind`; x0: (B, ...) in
    [−1, 1]; decoder, bins: see `decoder.log_likelihood`; variance, of p: see `chain.make_chain`;
    eta: in (0, 1]; timesteps: (num_steps+1,) levels of the chain, all T if None; clip: x̂_0 to [−1, 1];
    levels: how many consistency terms to draw, all if None. The pairs are cut into so many strata; each
    image draws one pair of each, which counts as often as its stratum has pairs: the sum keeps its expectation.
    `Terms.standard_error` tells its error for each image; of a mean over images it is within that over images.

    Returns Terms of (B,), (B,), (B, n_levels). Memory does not grow with the number of levels.
    Raises ValueError for arguments outside these; at η = 0 because there is no bound.
    """
    if form not in FORMS:
        raise ValueError(f'form is {form!r}, but must be one of {", ".join(FORMS)}')
    chain = make_chain(schedule, net, kind=kind, variance=variance, eta=eta, timesteps=timesteps, clip=clip)
    num_pairs, batch = len(chain.t) - 1, x0.shape[:1]  # the last pair is the decoder's
    if levels is not None and not 1 <= levels <= num_pairs:
        raise ValueError(f'levels is {levels}, but the chain has {num_pairs} consistency terms')
    decoder_key, prior_key, level_key, pair_key = jax.random.split(key, 4)
    if form == 'posterior':
        prior, term = prior_term(chain, x0), posterior_term
    else:
        prior, term = forward_prior_term(prior_key, chain, x0, form), functools.partial(forward_term, form=form)

    num_strata = num_pairs if levels is None else levels
    first = jnp.asarray(strata(num_pairs, num_strata))

    def stratum(_, j):
        i = jax.random.randint(jax.random.fold_in(level_key, j), batch, first[j], first[j + 1])
        return None, (first[j + 1] - first[j]) * term(jax.random.fold_in(pair_key, j), chain, x0, i)

    _, consistency = jax.lax.scan(stratum, None, jnp.arange(num_strata))
    return Terms(reconstruction(decoder_key, chain, x0, decoder=decoder, bins=bins), prior, consistency.T)


def strata(num_pairs, num_strata):
    """The first pair of each stratum, and num_pairs: (num_strata+1,) int."""
    return np.arange(num_strata + 1) * num_pairs // max(num_strata, 1)


def kl(mean1, std1, mean2, std2):
    """KL( N(mean1, std1²) ‖ N(mean2, std2²) ) of each image, summed over its pixels: (B,) nats."""
    log_ratio = jnp.log(std1 / std2)
    return per_image(0.5 * jnp.expm1(2 * log_ratio) - log_ratio + 0.5 * ((mean1 - mean2) / std2) ** 2)


def prior_term(chain, x0):
    """−KL( q(x_T|x_0) ‖ N(0, I) ): (B,) nats."""
    return -kl(chain.schedule.signal(chain.t[0]) * x0, chain.schedule.noise(chain.t[0]), 0.0, 1.0)


def posterior_term(key, chain, x0, i):
    """−KL( q_σ(x_s|x_t,x_0) ‖ p(x_s|x_t) ) of pair i (B,), s > 0, at one x_t ~ q(x_t|x_0): (B,) nats."""
    q, p = compare(chain, x0, jax.random.normal(key, x0.shape), i)
    return -kl(*q, *p)


def forward_prior_term(key, chain, x0, form):
    """log N(x_T; 0, I)/q(x_T|x_{T−1}) at one draw, or the −KL that is its mean over x_T: (B,) nats."""
    before_key, key = jax.random.split(key)
    mean, std, z, _ = _move(key, chain, x0, jax.random.normal(before_key, x0.shape), chain.s[0], chain.t[0])
    return -kl(mean, std, 0.0, 1.0) if form == 'printed' else log_ratio(z, mean, std, 0.0, 1.0)


def forward_term(key, chain, x0, i, *, form):
    """log p(x_s|x_t)/q(x_s|x_r) of pair i (B,), s > 0, at one draw; for 'printed' −KL( q(x_s|x_r) ‖ p(x_s|x_t) )."""
    below_key, s_key, t_key = jax.random.split(key, 3)
    r, s, t = jnp.asarray(chain.s)[i + 1], jnp.asarray(chain.s)[i], jnp.asarray(chain.t)[i]
    mean, std, z, eps = _move(s_key, chain, x0, jax.random.normal(below_key, x0.shape), r, s)
    *_, eps = _move(t_key, chain, x0, eps, s, t)
    _, p = compare(chain, x0, eps, i)
    return -kl(mean, std, *p) if form == 'printed' else log_ratio(z, mean, std, *p)


def _move(key, chain, x0, eps, s, t):
    """One draw of q_σ(x_t|x_s,x_0), eps the noise in x_s: its mean and std, the draw z, and the noise in x_t."""
    rho, rest = (gaussian.like(coefficient, x0) for coefficient in forward(chain, s, t))
    z = jax.random.normal(key, x0.shape)
    mean = gaussian.q_sample(chain.schedule, x0, t, rho * eps)
    return mean, gaussian.like(chain.schedule.noise(t), x0) * rest, z, rho * eps + rest * z
