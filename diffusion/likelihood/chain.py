"""The two chains that a likelihood compares: q_σ(x_{1:T} | x_0), which is known, and p_θ(x_{0:T})."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from diffusion import gaussian
from diffusion.gaussian import Clip, Images, Net, Variance
from diffusion.likelihood import draws
from diffusion.likelihood.decoder import Width, log_likelihood, per_image
from diffusion.schedule import Schedule
from diffusion.schedule import timesteps as all_timesteps

Normal = tuple[Images, Width]  # mean and standard deviation


@dataclasses.dataclass(frozen=True)
class Chain:
    """The pairs (t, s) of a chain, and what p needs to go from x_t to x_s; made by `make_chain`.

    Attributes:
        schedule: the noise schedule.
        net: the network, (x_t (B, ...), t (B,)) -> (B, ...).
        kind: what the network outputs, a key of `gaussian.KINDS`.
        eta: η of q_σ, in (0, 1].
        clip: whether and how x̂_0 is clipped, see `gaussian.predict`.
        decoder: (x0, mean, std) -> log p(x_0 | x_1) (B,) nats, see `decoder.log_likelihood`.
        t: (num_steps,), the noisiest first.
        s: (num_steps,), the last one 0: the pair of the decoder.
        std: (num_steps,), of p(x_s | x_t).
        widening: (num_steps,), if the network learns the variance, see `gaussian.learned_std`; `std` is then √β̃.
    """

    schedule: Schedule
    net: Net
    kind: str
    eta: float
    clip: Clip
    decoder: Callable[[Images, Images, Width], Float[Array, 'B']]
    t: Int[np.ndarray, 'num_steps']
    s: Int[np.ndarray, 'num_steps']
    std: Float[Array, 'num_steps']
    widening: Float[Array, 'num_steps'] | None = None


def make_chain(
    schedule: Schedule,
    net: Net,
    *,
    kind: str,
    variance: Variance = 'small',
    eta: float = 1.0,
    timesteps: Int[ArrayLike, 'num_steps+1'] | None = None,
    clip: Clip = False,
    decoder: str = 'discretized',
    bins: int = 256,
) -> Chain:
    """Build the chain that all likelihoods of a model share.

    The decoder needs a width at s = 0, where σ of the kernel is 0. There 'small' and 'large' both take σ of the pair
    before (with all T levels √β̃_2, as Ho's and OpenAI's code), or √(1−ᾱ_t) if there is only one pair. 'learned' takes
    it in the place of √β̃, and β = 1−ᾱ_t of the last pair, as OpenAI's code.

    Args:
        schedule: the noise schedule.
        net: the network, (x_t (B, ...), t (B,)) -> (B, ...); with variance 'learned' its last axis has twice the size,
            see `gaussian.evaluate_learned`.
        kind: what the network outputs, a key of `gaussian.KINDS`.
        variance: of p(x_s | x_t): 'small' (σ² of the kernel), 'large', 'learned' or an array (num_steps,), see
            `gaussian.own_variance`.
        eta: η of q_σ, in (0, 1].
        timesteps: the noise levels of the chain, which decrease to 0; all T if None.
        clip: whether and how x̂_0 is clipped to [−1, 1], see `gaussian.predict`.
        decoder: p(x_0 | x_1), a key of `decoder.DECODERS`.
        bins: the number of values of a pixel.

    Returns:
        The chain.

    Raises:
        ValueError: `eta` is outside (0, 1]; a variance is not positive; or `gaussian.chain` or
            `gaussian.own_variance` refuses its arguments.
    """
    if not 0 < eta <= 1:
        raise ValueError(
            f'eta is {eta}, but must lie in (0, 1]: with eta=0 q(x_s | x_t, x_0) has no width, its KL from any '
            'model is infinite, and there is no bound'
        )
    t, s = gaussian.chain(schedule, kind, all_timesteps(schedule.T, schedule.T) if timesteps is None else timesteps)
    variances = gaussian.own_variance(schedule, variance, s, t, eta=eta)
    if not isinstance(variance, (str, jax.core.Tracer)) and not np.all(np.asarray(variance) > 0):
        raise ValueError(f'variance is {variance}, but must be positive: with 0 the model has no density, and no bound')
    small = gaussian.small_std(schedule, s, t, eta=eta)
    std = small if variances is None else jnp.sqrt(variances)
    if isinstance(variance, str):
        std = std.at[-1].set(small[-1])
    widening = gaussian.log_widening(schedule, small, s, t) if gaussian.is_learned(variance) else None
    of_pixels = functools.partial(log_likelihood, decoder=decoder, bins=bins)
    return Chain(schedule, net, kind, eta, clip, of_pixels, t, s, std, widening)


def compare(chain: Chain, x0: Images, eps: Images, i: Int[Array, 'B']) -> tuple[Normal, Normal]:
    """Evaluate q_σ(x_s | x_t, x_0) and p(x_s | x_t) at x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε: one kernel, called twice.

    Args:
        chain: the chain.
        x0: (B, ...), clean images.
        eps: (B, ...), the noise in x_t.
        i: (B,) int, the index of the pair (t, s) of each image.

    Returns:
        (mean, std) of q, and (mean, std) of p; the means are (B, ...), and so is a learned std.
    """
    t, s = jnp.asarray(chain.t)[i], jnp.asarray(chain.s)[i]
    x_t = gaussian.q_sample(chain.schedule, x0, t, eps)
    std = gaussian.like(chain.std[i], x0)
    if chain.widening is None:
        output = gaussian.evaluate(chain.net, x_t, t)
    else:
        output, v = gaussian.evaluate_learned(chain.net, x_t, t)
        std = gaussian.learned_std(v, std, gaussian.like(chain.widening[i], x0))
    predicted = gaussian.predict(chain.schedule, chain.kind, output, x_t, t, clip=chain.clip)
    kernel = functools.partial(gaussian.posterior, chain.schedule, s=s, t=t, eta=chain.eta)
    p_mean, _ = kernel(predicted)
    return kernel(gaussian.Prediction(x0, eps)), (p_mean, std)


def reconstruction(key: draws.Keys, chain: Chain, x0: Images) -> Float[Array, 'B']:
    """One draw of log p(x_0 | x_1), x_1 ~ q(x_1 | x_0).

    Args:
        key: one key, or one for each image, see `draws`.
        chain: the chain.
        x0: (B, ...), clean images.

    Returns:
        (B,) nats.
    """
    last = jnp.full(x0.shape[:1], len(chain.t) - 1)
    _, p = compare(chain, x0, draws.normal(key, x0.shape), last)
    return chain.decoder(x0, *p)


def forward(chain: Chain, s: Int[Array, '*B'], t: Int[Array, '*B']) -> tuple[Float[Array, '*B'], Float[Array, '*B']]:
    """q_σ(x_t | x_s, x_0) for s < t, as x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε_t with ε_t = ρ·ε_s + √(1−ρ²)·z.

    By Bayes' rule from the kernel, ρ² = 1 − (σ/√(1−ᾱ_s))². For η = 1 this is DDPM's
    q(x_t | x_s) = N(√(ᾱ_t/ᾱ_s)·x_s, 1 − ᾱ_t/ᾱ_s), which does not need x_0. From s = 0, ρ = 0.

    Args:
        chain: the chain.
        s: (B,) or scalar, the noise levels before.
        t: (B,) or scalar, the noise levels after.

    Returns:
        ρ and √(1−ρ²), of the shape of `s` and `t`.
    """
    eta = jnp.where(s > 0, chain.eta, 1.0).astype(jnp.float32)
    noise_s, noise_t = chain.schedule.noise(s), chain.schedule.noise(t)
    kept = eta * jnp.exp(0.5 * chain.schedule.log_ratio(s, t)) * noise_s / noise_t
    square = (1 - eta**2) + kept**2
    rho = jnp.where(s > 0, jnp.sqrt(jnp.where(s > 0, square, 1)), 0)  # the root of 0 has no finite derivative
    return rho, eta * jnp.sqrt(chain.schedule.beta(s, t)) / noise_t


def log_ratio(z: Images, mean1: Images, std1: Width, mean2: Images | float, std2: Width | float) -> Float[Array, 'B']:
    """log N(x; mean2, std2²)/N(x; mean1, std1²) at x = mean1 + std1·z, summed over pixels.

    Computed so that two nearly equal Gaussians lose no digits.

    Args:
        z: (B, ...), standard normal.
        mean1: (B, ...), of the denominator, from which x is drawn.
        std1: broadcasts against `mean1`.
        mean2: (B, ...), of the numerator.
        std2: broadcasts against `mean2`.

    Returns:
        (B,) nats.
    """
    log_width = jnp.log(std1 / std2)
    shift = (mean1 - mean2) / std2
    return per_image(
        log_width - 0.5 * jnp.expm1(2 * log_width) * z**2 - jnp.exp(log_width) * z * shift - 0.5 * shift**2
    )
