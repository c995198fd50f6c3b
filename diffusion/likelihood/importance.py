"""The importance-weighted bound: Eq. (1) of the derivation, estimated with K trajectories."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.gaussian import Images, Net
from diffusion.likelihood import draws
from diffusion.likelihood.chain import compare, forward, log_ratio, make_chain
from diffusion.schedule import Schedule


def importance_bound(
    key: draws.Keys, schedule: Schedule, net: Net, x0: Images, *, kind: str, samples: int, **model: Any
) -> Float[Array, 'B']:
    """log 1/K Σ_k p(x_{0:T}^k)/q(x_{1:T}^k|x_0) of K = `samples` trajectories from q(x_{1:T}|x_0).

    In expectation this is a lower bound of log p(x_0) (IWAE, arXiv:1509.00519 Eq. 8): the ELBO for K = 1, rising with K
    to log p(x_0). The argument of the logarithm is an unbiased estimate of p(x_0) (Sohl-Dickstein et al. 2015).

    Memory grows neither with K nor with T.

    Args:
        key: typed PRNG key; or (B,) keys, one for each image, whose draws then do not depend on the other images.
        schedule: the noise schedule.
        net: the network, (x_t (B, ...), t (B,)) -> (B, ...).
        x0: (B, ...), images in [−1, 1].
        kind: what the network outputs, a key of `gaussian.KINDS`.
        samples: K, at least 1.
        **model: decoder, variance, eta, timesteps, clip and bins, see `chain.make_chain`.

    Returns:
        (B,) nats.

    Raises:
        ValueError: `samples` is less than 1, or `chain.make_chain` refuses the other arguments.
    """
    if samples < 1:
        raise ValueError(f'samples is {samples}, but must be at least 1')

    def trajectory(total, k):
        weight = log_weight(draws.fold_in(key, k), schedule, net, x0, kind=kind, **model)
        return jnp.logaddexp(total, weight), None

    total, _ = jax.lax.scan(trajectory, jnp.full(x0.shape[:1], -jnp.inf, jnp.float32), jnp.arange(samples))
    return total - math.log(samples)


def log_weight(
    key: draws.Keys, schedule: Schedule, net: Net, x0: Images, *, kind: str, **model: Any
) -> Float[Array, 'B']:
    """log p(x_{0:T})/q_σ(x_{1:T}|x_0) along one trajectory drawn from q_σ, for each image.

    The terms follow the chain as q draws it, x_T first:

        log N(x_T; 0, I)/q(x_T|x_0) + Σ_{s>0} log p(x_s|x_t)/q_σ(x_s|x_t,x_0) + log p(x_0|x_1)

    The sum over levels is compensated (Kahan), so that float32 keeps every digit of log-weights of tens of thousands of
    nats.

    Args:
        key: typed PRNG key; or (B,) keys, one for each image, whose draws then do not depend on the other images.
        schedule: the noise schedule.
        net: the network, (x_t (B, ...), t (B,)) -> (B, ...).
        x0: (B, ...), images in [−1, 1].
        kind: what the network outputs, a key of `gaussian.KINDS`.
        **model: decoder, variance, eta, timesteps, clip and bins, see `chain.make_chain`.

    Returns:
        (B,) nats.

    Raises:
        ValueError: `chain.make_chain` refuses the arguments.
    """
    chain = make_chain(schedule, net, kind=kind, **model)
    first_key, chain_key = draws.split(key)
    eps = draws.normal(first_key, x0.shape)
    signal, noise = schedule.signal(chain.t[0]), schedule.noise(chain.t[0])
    total = log_ratio(eps, signal * x0, noise, 0.0, 1.0)

    def step(carry, i):
        eps, total, lost = carry
        pair = jnp.full(x0.shape[:1], i)
        q, p = compare(chain, x0, eps, pair)
        z = draws.normal(draws.fold_in(chain_key, i), x0.shape)
        # From t down to s the kernel mixes the noise with the same ρ as `forward` does from s up to t.
        rho, rest = forward(chain, jnp.asarray(chain.s)[i], jnp.asarray(chain.t)[i])
        return (rho * eps + rest * z, *_kahan(total, lost, log_ratio(z, *q, *p))), None

    last = len(chain.t) - 1
    (eps, total, lost), _ = jax.lax.scan(step, (eps, total, jnp.zeros_like(total)), jnp.arange(last))
    _, p = compare(chain, x0, eps, jnp.full(x0.shape[:1], last))
    total, _ = _kahan(total, lost, chain.decoder(x0, *p))
    return total


def _kahan(
    total: Float[Array, 'B'], lost: Float[Array, 'B'], term: Float[Array, 'B']
) -> tuple[Float[Array, 'B'], Float[Array, 'B']]:
    """Return total + term, and the rounding error to subtract from the next term."""
    term = term - lost
    new = total + term
    return new, (new - total) - term
