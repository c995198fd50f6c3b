"""The two chains that a likelihood compares: q_σ(x_{1:T} | x_0), which is known, and p_θ(x_{0:T})."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import gaussian
from diffusion.likelihood.decoder import log_likelihood, per_image
from diffusion.schedule import Schedule
from diffusion.schedule import timesteps as all_timesteps


@dataclasses.dataclass(frozen=True)
class Chain:
    """The pairs (t, s) of a chain, the noisiest first, the decoder's (s = 0) last; and what p says of them."""

    schedule: Schedule
    net: Any
    kind: str
    eta: float
    clip: bool
    t: np.ndarray  # (num_steps,)
    s: np.ndarray  # (num_steps,)
    std: jax.Array  # (num_steps,), of p(x_s | x_t)


def make_chain(schedule, net, *, kind, variance, eta, timesteps=None, clip=False):
    """The Chain through the levels `timesteps` (all, if None).

    The std of p(x_s | x_t) is √ of `gaussian.own_variance`, or the kernel's σ for 'small'. At s = 0, where σ
    is 0 and a decoder needs a width, both 'small' and 'large' have the σ of the pair before (for all T levels
    √β̃_2, as Ho's and OpenAI's code), or √(1−ᾱ_t) if there is no pair before.

    Raises ValueError for η outside (0, 1], for a variance of 0, and whatever `gaussian.chain` and `own_variance`
    refuse.
    """
    if not 0 < eta <= 1:
        raise ValueError(
            f'eta is {eta}, but must lie in (0, 1]: with eta=0 q(x_s | x_t, x_0) has no width, its KL from any '
            'model is infinite, and there is no bound'
        )
    t, s = gaussian.chain(schedule, kind, all_timesteps(schedule.T, schedule.T) if timesteps is None else timesteps)
    own = gaussian.own_variance(schedule, variance, s, t, eta=eta)
    if not isinstance(variance, (str, jax.core.Tracer)) and not np.all(np.asarray(variance) > 0):
        raise ValueError(f'variance is {variance}, but where it is 0 the model has no density, and there is no bound')
    nothing = gaussian.Prediction(jnp.zeros(len(t)), jnp.zeros(len(t)))
    _, kernel_std = gaussian.posterior(schedule, nothing, s, t, eta=eta)
    std = kernel_std if own is None else jnp.sqrt(own)
    if isinstance(variance, str):
        std = std.at[-1].set(kernel_std[-2] if len(t) > 1 else schedule.noise(t[0]))
    return Chain(schedule, net, kind, eta, clip, t, s, std)


def compare(chain, x0, eps, i):
    """q_σ(x_s | x_t, x_0) and p(x_s | x_t) for pair i at x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε: one kernel, called twice.

    x0, eps: (B, ...); i: (B,) int. Returns (mean, std) of q and (mean, std) of p; means (B, ...).
    """
    t, s = jnp.asarray(chain.t)[i], jnp.asarray(chain.s)[i]
    x_t = gaussian.q_sample(chain.schedule, x0, t, eps)
    output = chain.net(x_t, t).astype(jnp.float32)
    predicted = gaussian.predict(chain.schedule, chain.kind, output, x_t, t, clip=chain.clip)
    kernel = functools.partial(gaussian.posterior, chain.schedule, s=s, t=t, eta=chain.eta)
    p_mean, _ = kernel(predicted)
    return kernel(gaussian.Prediction(x0, eps)), (p_mean, gaussian.like(chain.std[i], x0))


def reconstruction(key, chain, x0, *, decoder, bins):
    """One draw of log p(x_0 | x_1), x_1 ~ q(x_1|x_0): (B,) nats."""
    last = jnp.full(x0.shape[:1], len(chain.t) - 1)
    _, (mean, std) = compare(chain, x0, jax.random.normal(key, x0.shape), last)
    return log_likelihood(x0, mean, std, decoder=decoder, bins=bins)


def forward(chain, s, t):
    """q_σ(x_t | x_s, x_0) for s < t: x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε_t with ε_t = ρ·ε_s + √(1−ρ²)·z.

    It follows from the kernel by Bayes: ρ² = 1 − (σ/√(1−ᾱ_s))². For η = 1 it is DDPM's
    q(x_t|x_s) = N(√(ᾱ_t/ᾱ_s)·x_s, 1 − ᾱ_t/ᾱ_s), which needs no x_0. From s = 0, ρ = 0.

    Returns (ρ, √(1−ρ²)), of the shape of s and t.
    """
    eta = jnp.where(s > 0, chain.eta, 1.0)
    beta = chain.schedule.beta(s, t)
    noise_s, noise_t = chain.schedule.noise(s), chain.schedule.noise(t)
    rho = jnp.sqrt((1 - eta**2) + eta**2 * (1 - beta) * (noise_s / noise_t) ** 2)
    return rho, eta * jnp.sqrt(beta) / noise_t


def log_ratio(z, mean1, std1, mean2, std2):
    """log N(x; mean2, std2²)/N(x; mean1, std1²) at x = mean1 + std1·z, summed over pixels: (B,) nats.

    Written so that two Gaussians that are nearly the same lose no digits.
    """
    log_width = jnp.log(std1 / std2)
    shift = (mean1 - mean2) / std2
    return per_image(
        log_width - 0.5 * jnp.expm1(2 * log_width) * z**2 - jnp.exp(log_width) * z * shift - 0.5 * shift**2
    )
