"""The training loss: DDPM's L_simple, the ELBO itself, or another weighted ELBO."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int, Key

from diffusion import gaussian
from diffusion.gaussian import Images, Net
from diffusion.likelihood.chain import compare, make_chain
from diffusion.likelihood.elbo import kl, prior_term
from diffusion.schedule import Schedule


class Weighting(NamedTuple):
    """How a training loss draws its noise levels, and what it is at these levels, as two pure functions.

    Attributes:
        levels: (key, schedule, batch_size) -> t (B,) int, in 1 … T.
        loss: (schedule, net, x0, t, eps, kind) -> (B,), the loss at x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε.
    """

    levels: Callable[[Key[Array, ''], Schedule, int], Int[Array, 'B']]
    loss: Callable[[Schedule, Net, Images, Int[Array, 'B'], Images, str], Float[Array, 'B']]


def uniform_levels(key: Key[Array, ''], schedule: Schedule, batch_size: int) -> Int[Array, 'B']:
    """Draw t ~ Uniform{1, …, T} independently for each image (DDPM Algorithm 1).

    Args:
        key: typed PRNG key.
        schedule: the noise schedule.
        batch_size: B.

    Returns:
        (B,) int, in 1 … T.
    """
    return jax.random.randint(key, (batch_size,), 1, schedule.T + 1, jnp.int32)


def stratified_levels(key: Key[Array, ''], schedule: Schedule, batch_size: int) -> Int[Array, 'B']:
    """Draw t ~ Uniform{1, …, T} for each image, evenly spread over the batch.

    Args:
        key: typed PRNG key.
        schedule: the noise schedule.
        batch_size: B.

    Returns:
        (B,) int, in 1 … T.
    """
    T = schedule.T
    return T - jnp.minimum(jnp.floor(_evenly(key, batch_size) * T), T - 1).astype(jnp.int32)


def levels_of_density(
    density: Callable[[Float[Array, 'T']], Float[Array, 'T']],
) -> Callable[[Key[Array, ''], Schedule, int], Int[Array, 'B']]:
    """Return the `levels` of a `Weighting` whose log SNR, λ, has a given density, evenly spread over the batch.

        p(t) ∝ density(λ_t)·(λ_{t−1} − λ_{t+1})/2

    At the first and the last level, half of the difference to the neighbour counts. A level without signal, whose λ is
    −∞, is never drawn.

    Args:
        density: λ (T,) -> (T,), at least 0; it need not integrate to 1.

    Returns:
        (key, schedule, batch_size) -> t (B,) int, in 1 … T.
    """

    def levels(key, schedule, batch_size):
        log_snr = schedule.log_snr(jnp.arange(1, schedule.T + 1))
        log_snr = jnp.where(jnp.isfinite(log_snr), log_snr, jnp.min(log_snr, initial=jnp.inf, where=log_snr > -jnp.inf))
        middle = (log_snr[1:] + log_snr[:-1]) / 2
        width = -jnp.diff(middle, prepend=log_snr[:1], append=log_snr[-1:])
        total = jnp.cumsum(density(log_snr) * width)
        index = jnp.searchsorted(total, _evenly(key, batch_size) * total[-1], side='right')
        return 1 + index.clip(max=schedule.T - 1).astype(jnp.int32)

    return levels


def _evenly(key, batch_size):
    """u_i = u + i/B mod 1 with one uniform u (VDM, arXiv:2107.00630, appendix I.1)."""
    return (jax.random.uniform(key, dtype=jnp.float32) + jnp.arange(batch_size, dtype=jnp.float32) / batch_size) % 1


def simple_loss(
    schedule: Schedule, net: Net, x0: Images, t: Int[Array, 'B'], eps: Images, kind: str
) -> Float[Array, 'B']:
    """The mean over pixels of (target − net(x_t, t))² (DDPM Eq. 14, called L_simple).

    It is a weighted ELBO. In 𝓛 the term of level t is ½·(SNR(t−1) − SNR(t))·‖x_0 − x̂_0‖² (VDM Eq. 13); here the factor
    is SNR(t) for kind 'eps', 1 for 'x0' and 1 + SNR(t) for 'v', per pixel, and there is no prior term.

    Args:
        schedule: the noise schedule.
        net: the network, (x_t (B, ...), t (B,)) -> (B, ...).
        x0: (B, ...), images in [−1, 1].
        t: (B,) int, the noise levels, in 1 … T.
        eps: (B, ...), standard normal noise.
        kind: what the network outputs, a key of `gaussian.KINDS`.

    Returns:
        (B,) float32.
    """
    output = gaussian.evaluate(net, gaussian.q_sample(schedule, x0, t, eps), t)
    error = gaussian.target(schedule, kind, x0, t, eps) - output
    return jnp.mean(error**2, axis=tuple(range(1, x0.ndim)))


def vlb_loss(schedule: Schedule, net: Net, x0: Images, t: Int[Array, 'B'], eps: Images, kind: str) -> Float[Array, 'B']:
    """−𝓛 in bits/dim, the ELBO itself (DDPM Eq. 5), estimated from its term of level t.

    The estimate is T times that term plus the prior term, which is unbiased over uniform t. The variance of the model
    is β̃ ('small').

    Args:
        schedule: the noise schedule.
        net: the network, (x_t (B, ...), t (B,)) -> (B, ...).
        x0: (B, ...), images in [−1, 1] on the grid of 256 values.
        t: (B,) int, the noise levels, in 1 … T.
        eps: (B, ...), standard normal noise.
        kind: what the network outputs, a key of `gaussian.KINDS`.

    Returns:
        (B,) float32.
    """
    chain = make_chain(schedule, net, kind=kind)
    q, p = compare(chain, x0, eps, schedule.T - t)
    term = jnp.where(t == 1, chain.decoder(x0, *p), -kl(*q, *p))
    return -(schedule.T * term + prior_term(chain, x0)) / (math.log(2) * math.prod(x0.shape[1:]))


def weighted(
    weight: Callable[[Float[Array, 'B']], Float[Array, 'B']],
    levels: Callable[[Key[Array, ''], Schedule, int], Int[Array, 'B']] = uniform_levels,
) -> Weighting:
    """Return the weighting with the loss weight(SNR(t))·‖x_0 − x̂_0‖², a mean over pixels, whatever the kind.

    It is a weighted ELBO: in 𝓛 the term of level t is ½·(SNR(t−1) − SNR(t))·‖x_0 − x̂_0‖² (VDM Eq. 13), here it is
    p(t)·weight(SNR(t))·‖x_0 − x̂_0‖²; and there is no prior term.

    Args:
        weight: SNR (B,) -> (B,), the weight of ‖x_0 − x̂_0‖².
        levels: how levels are drawn, with probabilities p(t).
    """

    def loss(schedule, net, x0, t, eps, kind):
        x_t = gaussian.q_sample(schedule, x0, t, eps)
        prediction = gaussian.predict(schedule, kind, gaussian.evaluate(net, x_t, t), x_t, t)
        # The error of v, (1 + SNR)·‖x_0 − x̂_0‖², is finite at all levels, where that of x_0 or of ε may not be.
        signal, noise = gaussian.like(schedule.signal(t), x0), gaussian.like(schedule.noise(t), x0)
        error = signal * (eps - prediction.eps) - noise * (x0 - prediction.x0)
        snr = schedule.snr(t)
        return weight(snr) / (1 + snr) * jnp.mean(error**2, axis=tuple(range(1, x0.ndim)))

    return Weighting(levels, loss)


WEIGHTINGS = {
    'simple': Weighting(uniform_levels, simple_loss),
    'vlb': Weighting(stratified_levels, vlb_loss),
    # The error of ε, whatever the kind.
    'snr': weighted(lambda snr: snr),
    # Salimans and Ho 2022, arXiv:2202.00512, Eq. 9.
    'truncated_snr': weighted(lambda snr: jnp.maximum(snr, 1)),
    # Hang et al. 2023, arXiv:2303.09556, with γ = 5.
    'min_snr': weighted(lambda snr: jnp.minimum(snr, 5)),
    # P2, Choi et al. 2022, arXiv:2204.00227, with k = 1 and γ = 1: the error of ε times 1/(1 + SNR).
    'p2': weighted(lambda snr: snr / (1 + snr)),
    # Kingma and Gao 2023, arXiv:2303.00848: the error of ε, integrated over λ with the weight sigmoid(2 − λ).
    'sigmoid': weighted(lambda snr: snr, levels_of_density(lambda log_snr: jax.nn.sigmoid(2 - log_snr))),
    # EDM, Karras et al. 2022, arXiv:2206.00364, Table 1: ln σ ~ N(−1.2, 1.2²) with σ² = 1/SNR; weight 1/σ² + 1/0.5².
    'edm': weighted(lambda snr: snr + 4, levels_of_density(lambda log_snr: norm.pdf(log_snr, 2.4, 2.4))),
}


def loss(
    key: Key[Array, ''], schedule: Schedule, net: Net, x0: Images, *, kind: str, weighting: str = 'simple'
) -> Float[Array, 'B']:
    """One draw of the training loss of each image; its expectation is the loss over all levels and noise.

    Args:
        key: typed PRNG key.
        schedule: the noise schedule.
        net: the network, (x_t (B, ...), t (B,)) -> (B, ...).
        x0: (B, ...), images in [−1, 1].
        kind: what the network outputs, a key of `gaussian.KINDS`.
        weighting: a key of `WEIGHTINGS`.

    Returns:
        (B,) float32.

    Raises:
        ValueError: the weighting or the kind is unknown; x0 are whole numbers or outside [−1, 1], as far as that can
            be seen; or the output of the network has another shape than its input.
    """
    gaussian.require_images(x0)
    t, eps = draw(key, schedule, x0.shape, weighting=weighting)
    return WEIGHTINGS[weighting].loss(schedule, net, x0, t, eps, kind)


def draw(
    key: Key[Array, ''], schedule: Schedule, shape: tuple[int, ...], *, weighting: str = 'simple'
) -> tuple[Int[Array, 'B'], Images]:
    """Draw the noise levels and the noise of a training loss.

    Args:
        key: typed PRNG key.
        schedule: the noise schedule.
        shape: (B, ...), the shape of the batch of images.
        weighting: a key of `WEIGHTINGS`.

    Returns:
        t (B,) int in 1 … T, and ε (B, ...), standard normal.

    Raises:
        ValueError: the weighting is unknown.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f'weighting is {weighting!r}, but must be one of {", ".join(WEIGHTINGS)}')
    level_key, noise_key = jax.random.split(key)
    return WEIGHTINGS[weighting].levels(level_key, schedule, shape[0]), jax.random.normal(noise_key, shape, jnp.float32)
