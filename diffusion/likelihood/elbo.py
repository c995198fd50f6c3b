"""The evidence lower bound 𝓛 ≤ log p(x_0), in the three forms of the derivation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from diffusion import gaussian
from diffusion.gaussian import Clip, Images, Net, Variance
from diffusion.likelihood import draws
from diffusion.likelihood.chain import Chain, Normal, compare, forward, log_ratio, make_chain, reconstruction
from diffusion.likelihood.decoder import Width, per_image
from diffusion.schedule import Schedule

Nats = Float[Array, 'B']


class Terms(NamedTuple):
    """The terms of 𝓛 in nats, which add up to the bound (except for form 'printed').

    Attributes:
        reconstruction: (B,).
        prior: (B,).
        consistency: (B, n_levels), the noisiest first.
    """

    reconstruction: Nats
    prior: Nats
    consistency: Float[Array, 'B n_levels']

    def total(self) -> Nats:
        """𝓛 of each image: (B,) nats."""
        return self.reconstruction + self.prior + self.consistency.sum(axis=1)

    def standard_error(self) -> Nats:
        """The standard error of the sum of consistency terms of each image, due to the draws of levels and noise.

            √Σ_j (y_2j − y_2j+1)²                            Cochran, Sampling Techniques, §5A.12 (collapsed strata)

        The sum is over pairs of neighbouring terms; if their number is odd, the last term is paired with the one before
        it as well. The square of the error is, in expectation, the variance of the sum plus the squared differences of
        the means of paired terms (plus, if their number is odd, the variance of the term that is in two pairs): it may
        be too large, but not too small.

        Returns:
            (B,) nats; NaN if there is only one term.
        """
        y = self.consistency
        if y.shape[1] < 2:
            with jax.debug_nans(False):  # NaN is the answer
                return jnp.full(y.shape[:1], jnp.nan, jnp.float32)
        half = y.shape[1] // 2
        squares = ((y[:, : 2 * half : 2] - y[:, 1 : 2 * half : 2]) ** 2).sum(axis=1)
        return jnp.sqrt(squares + (y[:, -1] - y[:, -2]) ** 2 * (y.shape[1] % 2))


class Form(NamedTuple):
    """One way to write 𝓛 as a prior term and consistency terms.

    Attributes:
        title: its name in the ledger.
        equation: where it is defined.
        prior: (key, chain, x0) -> (B,) nats, one draw of the prior term; the key as in `draws`.
        consistency: (key, chain, x0, i) -> (B,) nats, one draw of the consistency term of pair i (B,) = (t, s), s > 0.
        note: a sentence that readers of the ledger need, below its table.
    """

    title: str
    equation: str
    prior: Callable[[draws.Keys, Chain, Images], Nats]
    consistency: Callable[[draws.Keys, Chain, Images, Int[Array, 'B']], Nats]
    note: str = ''


def elbo(
    key: draws.Keys,
    schedule: Schedule,
    net: Net,
    x0: Images,
    *,
    kind: str,
    form: str = 'posterior',
    decoder: str = 'discretized',
    variance: Variance = 'small',
    eta: float = 1.0,
    timesteps: Int[ArrayLike, 'num_steps+1'] | None = None,
    levels: int | None = None,
    clip: Clip = False,
    bins: int = 256,
) -> Terms:
    """One draw of the terms of 𝓛 for each image; the expectation of their sum is the bound.

    For a chain of pairs (t, s) whose first t is called T and whose last t is called 1, with r the level below s:

        reconstruction   E_{q(x_1|x_0)} log p(x_0|x_1), in all forms

        'posterior'      DDPM Eq. 5, the form used for training
            prior        −KL( q(x_T|x_0) ‖ N(0, I) )
            consistency  −E_{q(x_t|x_0)} KL( q_σ(x_s|x_t,x_0) ‖ p(x_s|x_t) )
        'transition'     Eq. (8) of the derivation: the same in expectation, with far more variance
            prior        E log N(x_T; 0, I)/q(x_T|x_{T−1})
            consistency  E log p(x_s|x_t)/q(x_s|x_r)
        'printed'        Eq. (9) as tutorials print it, which is *not* 𝓛
            prior        −E KL( q(x_T|x_{T−1}) ‖ N(0, I) )
            consistency  −E_{q(x_r,x_t|x_0)} KL( q(x_s|x_r) ‖ p(x_s|x_t) ), wrong: it assumes that x_s and x_t are
                         independent given x_r, but x_t is made from x_s

    There is one consistency term for each pair with s > 0. For η < 1, q(x_s|x_r) is that of DDIM's family, given x_0.
    Memory does not grow with the number of levels.

    Args:
        key: typed PRNG key; or (B,) keys, one for each image, whose draws then do not depend on the other images.
        schedule: the noise schedule.
        net: the network, (x_t (B, ...), t (B,)) -> (B, ...).
        x0: (B, ...), images in [−1, 1].
        kind: what the network outputs, a key of `gaussian.KINDS`.
        form: a key of `FORMS`.
        decoder: p(x_0 | x_1). See `chain.make_chain` for this and all following arguments except `levels`.
        variance: of p(x_s | x_t).
        eta: η of q_σ, in (0, 1].
        timesteps: the noise levels of the chain; all T if None.
        levels: the number of consistency terms to draw for each image; all if None. The pairs are split into this many
            strata, and one pair is drawn from each. Its term is multiplied by the number of pairs in the stratum, so
            that the sum keeps its expectation; `Terms.standard_error` estimates the error for each image.
        clip: whether and how x̂_0 is clipped.
        bins: the number of values of a pixel.

    Returns:
        The terms, (B,), (B,) and (B, n_levels), in nats.

    Raises:
        ValueError: the form is unknown, `levels` is not between 1 and the number of consistency terms, or
            `chain.make_chain` refuses the other arguments.
    """
    if form not in FORMS:
        raise ValueError(f'form is {form!r}, but must be one of {", ".join(FORMS)}')
    chain = make_chain(
        schedule, net, kind=kind, variance=variance, eta=eta, timesteps=timesteps, clip=clip, decoder=decoder, bins=bins
    )
    num_pairs = len(chain.t) - 1  # the last pair is the decoder's
    if levels is not None and not 1 <= levels <= num_pairs:
        raise ValueError(f'levels is {levels}, but the chain has {num_pairs} consistency terms')
    decoder_key, prior_key, level_key, pair_key = draws.split(key, 4)
    num_strata = num_pairs if levels is None else levels
    first = jnp.asarray(strata(num_pairs, num_strata))

    def stratum(_, j):
        i = draws.integers(draws.fold_in(level_key, j), len(x0), first[j], first[j + 1])
        term = FORMS[form].consistency(draws.fold_in(pair_key, j), chain, x0, i)
        return None, (first[j + 1] - first[j]) * term

    _, consistency = jax.lax.scan(stratum, None, jnp.arange(num_strata))
    return Terms(reconstruction(decoder_key, chain, x0), FORMS[form].prior(prior_key, chain, x0), consistency.T)


def strata(num_pairs: int, num_strata: int) -> Int[np.ndarray, 'num_strata+1']:
    """Split the consistency terms into strata of nearly equal size.

    Args:
        num_pairs: the number of consistency terms.
        num_strata: the number of strata, at most `num_pairs`.

    Returns:
        The index of the first pair of each stratum, and `num_pairs` at the end.
    """
    return np.arange(num_strata + 1) * num_pairs // max(num_strata, 1)


def kl(mean1: Images, std1: Width, mean2: Images | float, std2: Width | float) -> Nats:
    """KL( N(mean1, std1²) ‖ N(mean2, std2²) ) of each image, summed over its pixels.

    Args:
        mean1: (B, ...).
        std1: broadcasts against `mean1`.
        mean2: (B, ...).
        std2: broadcasts against `mean2`.

    Returns:
        (B,) nats.
    """
    log_width = jnp.log(std1 / std2)
    return per_image(0.5 * jnp.expm1(2 * log_width) - log_width + 0.5 * ((mean1 - mean2) / std2) ** 2)


def prior_term(chain: Chain, x0: Images) -> Nats:
    """−KL( q(x_T|x_0) ‖ N(0, I) ), the prior term of the posterior form.

    Args:
        chain: the chain.
        x0: (B, ...), clean images.

    Returns:
        (B,) nats.
    """
    return -kl(chain.schedule.signal(chain.t[0]) * x0, chain.schedule.noise(chain.t[0]), 0.0, 1.0)


def _posterior_consistency(key, chain, x0, i):
    """−KL( q_σ(x_s|x_t,x_0) ‖ p(x_s|x_t) ) at one x_t ~ q(x_t|x_0)."""
    q, p = compare(chain, x0, draws.normal(key, x0.shape), i)
    return -kl(*q, *p)


def _transition_prior(key, chain, x0):
    """log N(x_T; 0, I)/q(x_T|x_{T−1}) at one draw."""
    z, q = _last_transition(key, chain, x0)
    return log_ratio(z, *q, 0.0, 1.0)


def _transition_consistency(key, chain, x0, i):
    """log p(x_s|x_t)/q(x_s|x_r) at one draw."""
    z, q, p = _neighbours(key, chain, x0, i)
    return log_ratio(z, *q, *p)


def _printed_prior(key, chain, x0):
    """−KL( q(x_T|x_{T−1}) ‖ N(0, I) ) at one x_{T−1}; its mean is that of `_transition_prior`."""
    _, q = _last_transition(key, chain, x0)
    return -kl(*q, 0.0, 1.0)


def _printed_consistency(key, chain, x0, i):
    """−KL( q(x_s|x_r) ‖ p(x_s|x_t) ) at one draw of x_r and x_t; not a term of 𝓛."""
    _, q, p = _neighbours(key, chain, x0, i)
    return -kl(*q, *p)


def _last_transition(key: draws.Keys, chain: Chain, x0: Images) -> tuple[Images, Normal]:
    """Draw x_T from q(x_T|x_{T−1}); return its noise z, and the Gaussian."""
    before_key, key = draws.split(key)
    z, q, _ = _move(key, chain, x0, draws.normal(before_key, x0.shape), chain.s[0], chain.t[0])
    return z, q


def _neighbours(key: draws.Keys, chain: Chain, x0: Images, i: Int[Array, 'B']) -> tuple[Images, Normal, Normal]:
    """Draw x_r, x_s and x_t along q; return the noise z of x_s, and the Gaussians q(x_s|x_r) and p(x_s|x_t)."""
    below_key, s_key, t_key = draws.split(key, 3)
    r, s, t = jnp.asarray(chain.s)[i + 1], jnp.asarray(chain.s)[i], jnp.asarray(chain.t)[i]
    z, q, eps = _move(s_key, chain, x0, draws.normal(below_key, x0.shape), r, s)
    *_, eps = _move(t_key, chain, x0, eps, s, t)
    _, p = compare(chain, x0, eps, i)
    return z, q, p


def _move(
    key: draws.Keys, chain: Chain, x0: Images, eps: Images, s: Int[Array, '*B'], t: Int[Array, '*B']
) -> tuple[Images, Normal, Images]:
    """Draw x_t from q_σ(x_t|x_s,x_0), where eps is the ε of x_s; return its noise z, the Gaussian, and the ε of x_t."""
    rho, rest = (gaussian.like(coefficient, x0) for coefficient in forward(chain, s, t))
    z = draws.normal(key, x0.shape)
    mean = gaussian.q_sample(chain.schedule, x0, t, rho * eps)
    return z, (mean, gaussian.like(chain.schedule.noise(t), x0) * rest), rho * eps + rest * z


FORMS = {
    'posterior': Form(
        'ELBO, posterior form', 'DDPM Eq. 5', lambda key, chain, x0: prior_term(chain, x0), _posterior_consistency
    ),
    'transition': Form('ELBO, transition form', 'Eq. (8)', _transition_prior, _transition_consistency),
    'printed': Form(
        'as printed, which is not the ELBO',
        'Eq. (9)',
        _printed_prior,
        _printed_consistency,
        'Eq. (9) is no likelihood, however many bits/dim it shows: as tutorials print it, it treats a latent as '
        'independent of its noisier neighbour given the cleaner one, which makes its KL far too large, even for a '
        'perfect model (docs/derivation.md).',
    ),
}
