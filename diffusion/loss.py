"""The training loss: DDPM's L_simple, or the ELBO itself."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from diffusion import gaussian
from diffusion.gaussian import Images, Net
from diffusion.likelihood.chain import compare, make_chain
from diffusion.likelihood.elbo import kl, prior_term
from diffusion.schedule import Schedule


class Weighting(NamedTuple):
    """How a training loss draws its noise levels, and what it is at these levels, as two pure functions.

    Attributes:
        levels: (key, T, batch_size) -> t (B,) int, in 1 … T.
        loss: (schedule, net, x0, t, eps, kind) -> (B,), the loss at x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε.
    """

    levels: Callable[[Key[Array, ''], int, int], Int[Array, 'B']]
    loss: Callable[[Schedule, Net, Images, Int[Array, 'B'], Images, str], Float[Array, 'B']]


def uniform_levels(key: Key[Array, ''], T: int, batch_size: int) -> Int[Array, 'B']:
    """Draw t ~ Uniform{1, …, T} independently for each image (DDPM Algorithm 1).

    Args:
        key: typed PRNG key.
        T: the number of noise levels.
        batch_size: B.

    Returns:
        (B,) int, in 1 … T.
    """
    return jax.random.randint(key, (batch_size,), 1, T + 1)


def stratified_levels(key: Key[Array, ''], T: int, batch_size: int) -> Int[Array, 'B']:
    """Draw t ~ Uniform{1, …, T} for each image, evenly spread over the batch: u_i = u + i/B mod 1.

    VDM (arXiv:2107.00630) appendix I.1.

    Args:
        key: typed PRNG key.
        T: the number of noise levels.
        batch_size: B.

    Returns:
        (B,) int, in 1 … T.
    """
    u = jax.random.uniform(key) + jnp.arange(batch_size) / batch_size
    return T - jnp.minimum(jnp.floor(u % 1 * T), T - 1).astype(jnp.int32)


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
    output = net(gaussian.q_sample(schedule, x0, t, eps), t)
    error = gaussian.target(schedule, kind, x0, t, eps) - output.astype(jnp.float32)
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


WEIGHTINGS = {'simple': Weighting(uniform_levels, simple_loss), 'vlb': Weighting(stratified_levels, vlb_loss)}


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
        ValueError: the weighting or the kind is unknown.
    """
    t, eps = draw(key, schedule.T, x0.shape, weighting=weighting)
    return WEIGHTINGS[weighting].loss(schedule, net, x0, t, eps, kind)


def draw(
    key: Key[Array, ''], T: int, shape: tuple[int, ...], *, weighting: str = 'simple'
) -> tuple[Int[Array, 'B'], Images]:
    """Draw the noise levels and the noise of a training loss.

    Args:
        key: typed PRNG key.
        T: the number of noise levels.
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
    return WEIGHTINGS[weighting].levels(level_key, T, shape[0]), jax.random.normal(noise_key, shape)
