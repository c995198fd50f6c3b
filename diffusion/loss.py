"""The training loss: DDPM's L_simple, the ELBO itself, or another weighted ELBO."""

import functools
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

Loss = Callable[[Schedule, Net, Images, Int[Array, 'B'], Images, str], Float[Array, 'B']]

LAMBDA = 0.001  # the factor of L_vlb in L_hybrid
KEPT = 10  # losses of each level in a `History`
UNIFORM_SHARE = 0.001  # share of the levels that are drawn uniformly, whatever their losses were


class Weighting(NamedTuple):
    """How a training loss draws its noise levels, and what it is at these levels, as two pure functions.

    Attributes:
        levels: (key, schedule, batch_size) -> t (B,) int, in 1 … T.
        loss: (schedule, net, x0, t, eps, kind) -> (B,), the loss at x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε; None if there is
            none for a net of fixed variance.
        learned: the same for a net that learns the variance (`gaussian.evaluate_learned`); None if the loss would not
            train the variance.
        by_history: whether training importance-samples levels by their losses in earlier steps, see `History`.
    """

    levels: Callable[[Key[Array, ''], Schedule, int], Int[Array, 'B']]
    loss: Loss | None
    learned: Loss | None = None
    by_history: bool = False


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
    return T - jnp.minimum(jnp.floor(_stratified_uniforms(key, batch_size) * T), T - 1).astype(jnp.int32)


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
        index = jnp.searchsorted(total, _stratified_uniforms(key, batch_size) * total[-1], side='right')
        return 1 + index.clip(max=schedule.T - 1).astype(jnp.int32)

    return levels


def _stratified_uniforms(key, batch_size):
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


def vlb_loss(
    schedule: Schedule,
    net: Net,
    x0: Images,
    t: Int[Array, 'B'],
    eps: Images,
    kind: str,
    *,
    variance: str = 'small',
) -> Float[Array, 'B']:
    """−𝓛 in bits/dim, the ELBO itself (DDPM Eq. 5), estimated from its term of level t.

    The estimate is T times that term plus the prior term, which is unbiased over uniform t.

    Args:
        schedule: the noise schedule.
        net: the network, (x_t (B, ...), t (B,)) -> (B, ...).
        x0: (B, ...), images in [−1, 1] on the grid of 256 values.
        t: (B,) int, the noise levels, in 1 … T.
        eps: (B, ...), standard normal noise.
        kind: what the network outputs, a key of `gaussian.KINDS`.
        variance: of the model, see `likelihood.chain.make_chain`; 'learned' has a net with twice as many outputs.

    Returns:
        (B,) float32.
    """
    chain = make_chain(schedule, net, kind=kind, variance=variance)
    (mean, std), p = compare(chain, x0, eps, schedule.T - t)  # pair T − t starts at level t
    # At t = 1 std is 0. The KL is not used there, but its gradient would be NaN.
    std = jnp.where(gaussian.like(t == 1, x0), 1, std)
    term = jnp.where(t == 1, chain.decoder(x0, *p), -kl(mean, std, *p))
    return -(schedule.T * term + prior_term(chain, x0)) / (math.log(2) * math.prod(x0.shape[1:]))


def hybrid_loss(
    schedule: Schedule, net: Net, x0: Images, t: Int[Array, 'B'], eps: Images, kind: str
) -> Float[Array, 'B']:
    """L_hybrid = L_simple + 0.001·L_vlb, for a net that learns the variance.

    Improved DDPM (arXiv:2102.09672) Eq. 16. L_vlb is `vlb_loss`, in bits/dim and T times the term of level t, as in
    OpenAI's code (there, the term 'rescaled' by T/1000). The gradient of L_vlb stops at the mean, which learns from
    L_simple alone.

    Args:
        schedule: the noise schedule.
        net: the network, (x_t (B, ..., C), t (B,)) -> (B, ..., 2C).
        x0: (B, ...), images in [−1, 1] on the grid of 256 values.
        t: (B,) int, the noise levels, in 1 … T.
        eps: (B, ...), standard normal noise.
        kind: what the network outputs, a key of `gaussian.KINDS`.

    Returns:
        (B,) float32.
    """
    output, v = gaussian.evaluate_learned(net, gaussian.q_sample(schedule, x0, t, eps), t)
    fixed = jnp.concatenate([jax.lax.stop_gradient(output), v], axis=-1)
    simple = simple_loss(schedule, lambda x_t, t: output, x0, t, eps, kind)
    return simple + LAMBDA * vlb_loss(schedule, lambda x_t, t: fixed, x0, t, eps, kind, variance='learned')


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
        # ‖v − v̂‖² = (1 + SNR)·‖x_0 − x̂_0‖² is finite at every level; the errors of x_0 and ε may not be.
        signal, noise = gaussian.like(schedule.signal(t), x0), gaussian.like(schedule.noise(t), x0)
        error = signal * (eps - prediction.eps) - noise * (x0 - prediction.x0)
        snr = schedule.snr(t)
        return weight(snr) / (1 + snr) * jnp.mean(error**2, axis=tuple(range(1, x0.ndim)))

    return Weighting(levels, loss)


learned_vlb_loss = functools.partial(vlb_loss, variance='learned')

WEIGHTINGS = {
    'simple': Weighting(uniform_levels, simple_loss),
    'vlb': Weighting(stratified_levels, vlb_loss, learned_vlb_loss),
    # Nichol and Dhariwal 2021, arXiv:2102.09672: the same with importance-sampled levels; L_simple plus the vlb.
    'vlb_importance': Weighting(stratified_levels, vlb_loss, learned_vlb_loss, by_history=True),
    'hybrid': Weighting(uniform_levels, None, hybrid_loss),
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


class History(NamedTuple):
    """The last losses of each level, by which levels are importance-sampled; level t is row t − 1.

    Attributes:
        losses: (T, KEPT) float32.
        counts: (T,) int32, how many losses the level has had, up to KEPT; once full, KEPT + the column of the oldest.
    """

    losses: Float[Array, 'T KEPT']
    counts: Int[Array, 'T']


def init_history(T: int) -> History:
    """Return the history before the first step.

    Args:
        T: the number of noise levels.
    """
    return History(jnp.zeros((T, KEPT), jnp.float32), jnp.zeros(T, jnp.int32))


def draw_by_history(history: History, key: Key[Array, ''], batch_size: int) -> Int[Array, 'B']:
    """Draw t with the probabilities of `importance_weights`, evenly spread over the batch.

    Args:
        history: the losses so far.
        key: typed PRNG key.
        batch_size: B.

    Returns:
        (B,) int, in 1 … T.
    """
    which_key, uniform_key, loss_key = jax.random.split(key, 3)
    T, ends = len(history.counts), _cumulative(history)
    uniforms = _stratified_uniforms(loss_key, batch_size)
    by_loss = jnp.searchsorted(ends, uniforms, side='right').clip(max=T - 1).astype(jnp.int32)
    at_random = jax.random.randint(uniform_key, (batch_size,), 0, T, jnp.int32)
    return 1 + jnp.where(jax.random.bernoulli(which_key, UNIFORM_SHARE, (batch_size,)), at_random, by_loss)


def importance_weights(history: History, t: Int[Array, 'B']) -> Float[Array, 'B']:
    """Importance weights 1/(T·p_t) of losses at levels from `draw_by_history`.

    Weighted by them, these losses have the same mean as losses at uniform levels.

        p_t ∝ √E[L_t²]                                               Improved DDPM (arXiv:2102.09672) Eq. 18

    The expectation is the mean over the last KEPT losses of level t. Until each level has as many, p_t is uniform; from
    then on a share UNIFORM_SHARE of the levels is, as in OpenAI's code, so that none is never drawn.

    Args:
        history: the losses that the levels were drawn by.
        t: (B,) int, in 1 … T.

    Returns:
        (B,) float32.
    """
    T = len(history.counts)
    # From the same cumulative sums as the draws, so that rounding agrees.
    probability = (1 - UNIFORM_SHARE) * jnp.diff(_cumulative(history), prepend=0) + UNIFORM_SHARE / T
    return 1 / (T * probability[t - 1])


def _cumulative(history):
    """P(level ≤ t) of the levels that are drawn by their losses, (T,)."""
    T = len(history.counts)
    largest = jnp.abs(history.losses).max()
    root = jnp.sqrt(jnp.mean((history.losses / jnp.where(largest > 0, largest, 1)) ** 2, axis=1))
    known = (history.counts >= KEPT).all() & (largest > 0)
    total = jnp.cumsum(jnp.where(known, root, 1))
    return (total / total[-1]).at[T - 1].set(1)


def update_history(history: History, t: Int[Array, 'B'], losses: Float[Array, 'B']) -> History:
    """Replace the oldest losses of levels by new ones.

    Args:
        history: the losses before.
        t: (B,) int, in 1 … T; a level may occur several times.
        losses: (B,), unweighted; of a level that occurs more than KEPT times, the last ones are kept.

    Returns:
        The losses after.
    """
    T = len(history.counts)
    order = jnp.argsort(t, stable=True)
    level = t[order] - 1
    place = jnp.arange(len(t), dtype=jnp.int32) - jnp.searchsorted(level, level)  # among those of the same level
    new = jnp.zeros(T, jnp.int32).at[level].add(1)
    column = (history.counts[level] + place) % KEPT
    row = jnp.where(place < new[level] - KEPT, T, level)  # rows that do not exist are dropped: no element is set twice
    kept = history.losses.at[row, column].set(losses[order], mode='drop')
    counts = history.counts + new
    return History(kept, jnp.where(counts < KEPT, counts, KEPT + counts % KEPT))


def loss_of(weighting: str, *, learned: bool = False) -> Loss:
    """Return the function of a weighting that computes the loss at given levels.

    Args:
        weighting: a key of `WEIGHTINGS`.
        learned: whether the net learns the variance.

    Returns:
        (schedule, net, x0, t, eps, kind) -> (B,).

    Raises:
        ValueError: the weighting is unknown, or has no loss for such a net.
    """
    found = _weighting(weighting)
    function = found.learned if learned else found.loss
    if function is None:
        others = [name for name, other in WEIGHTINGS.items() if (other.learned if learned else other.loss)]
        why = 'would not train the learned variance' if learned else 'trains a variance, but the net learns none'
        other_net = 'a net of fixed variance' if learned else 'a net that learns the variance'
        raise ValueError(
            f'weighting {weighting!r} {why}: use one of {", ".join(map(repr, others))}, or learned={not learned} with '
            f'{other_net}'
        )
    return function


def loss(
    key: Key[Array, ''],
    schedule: Schedule,
    net: Net,
    x0: Images,
    *,
    kind: str,
    weighting: str = 'simple',
    learned: bool = False,
    history: History | None = None,
) -> Float[Array, 'B']:
    """One draw of the training loss of each image; its expectation is the loss over all levels and noise.

    Args:
        key: typed PRNG key.
        schedule: the noise schedule.
        net: the network, (x_t (B, ...), t (B,)) -> (B, ...); if it learns the variance, its last axis has twice the
            size, see `gaussian.evaluate_learned`.
        x0: (B, ...), images in [−1, 1].
        kind: what the network outputs, a key of `gaussian.KINDS`.
        weighting: a key of `WEIGHTINGS`.
        learned: whether the net learns the variance.
        history: of a weighting `by_history`, by which levels are then drawn and losses weighted.

    Returns:
        (B,) float32.

    Raises:
        ValueError: the weighting or the kind is unknown, or the weighting has no loss for such a net; x0 are whole
            numbers or outside [−1, 1], as far as that can be seen; or the output of the network has another shape than
            its input.
    """
    gaussian.require_images(x0)
    t, eps = draw(key, schedule, x0.shape, weighting=weighting, history=history)
    values = loss_of(weighting, learned=learned)(schedule, net, x0, t, eps, kind)
    return values if history is None else importance_weights(history, t) * values


def draw(
    key: Key[Array, ''],
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    weighting: str = 'simple',
    history: History | None = None,
) -> tuple[Int[Array, 'B'], Images]:
    """Draw the noise levels and the noise of a training loss.

    Args:
        key: typed PRNG key.
        schedule: the noise schedule.
        shape: (B, ...), the shape of the batch of images.
        weighting: a key of `WEIGHTINGS`.
        history: by which levels are drawn; None draws them as the weighting says.

    Returns:
        t (B,) int in 1 … T, and ε (B, ...), standard normal.

    Raises:
        ValueError: the weighting is unknown.
    """
    levels = _weighting(weighting).levels
    level_key, noise_key = jax.random.split(key)
    t = levels(level_key, schedule, shape[0]) if history is None else draw_by_history(history, level_key, shape[0])
    return t, jax.random.normal(noise_key, shape, jnp.float32)


def _weighting(name: str) -> Weighting:
    if name not in WEIGHTINGS:
        raise ValueError(f'weighting is {name!r}, but must be one of {", ".join(WEIGHTINGS)}')
    return WEIGHTINGS[name]
