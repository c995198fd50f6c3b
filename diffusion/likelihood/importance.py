"""The importance-weighted bound: Eq. (1) of the derivation, estimated with K trajectories."""

import jax
import jax.numpy as jnp

from diffusion.likelihood.chain import compare, forward, log_ratio, make_chain
from diffusion.likelihood.decoder import log_likelihood


def importance_bound(
    key,
    schedule,
    net,
    x0,
    *,
    kind,
    samples,
    decoder='discretized',
    variance='small',
    eta=1.0,
    timesteps=None,
    clip=False,
    bins=256,
):
    """log 1/K Σ_k p(x_{0:T}^k)/q(x_{1:T}^k|x_0) of K = `samples` trajectories from q(x_{1:T}|x_0).

    A lower bound of log p(x_0) in expectation (IWAE, arXiv:1509.00519 Eq. 8): for K = 1 the ELBO, rising
    with K to log p(x_0). Its argument is unbiased for p(x_0) itself (Sohl-Dickstein et al. 2015).

    The other arguments are those of `elbo.elbo`. Returns (B,) nats. Memory grows neither with K nor with T.
    Raises ValueError for samples < 1, and what `log_weight` raises.
    """
    if samples < 1:
        raise ValueError(f'samples is {samples}, but must be at least 1')
    how = dict(kind=kind, decoder=decoder, variance=variance, eta=eta, timesteps=timesteps, clip=clip, bins=bins)

    def trajectory(total, k):
        return jnp.logaddexp(total, log_weight(jax.random.fold_in(key, k), schedule, net, x0, **how)), None

    total, _ = jax.lax.scan(trajectory, jnp.full(x0.shape[:1], -jnp.inf), jnp.arange(samples))
    return total - jnp.log(samples)


def log_weight(
    key,
    schedule,
    net,
    x0,
    *,
    kind,
    decoder='discretized',
    variance='small',
    eta=1.0,
    timesteps=None,
    clip=False,
    bins=256,
):
    """log p(x_{0:T})/q_σ(x_{1:T}|x_0) along one trajectory drawn from q_σ, for each image: (B,) nats.

    Written along the chain as q draws it, x_T first:

        log N(x_T; 0, I)/q(x_T|x_0) + Σ_{s>0} log p(x_s|x_t)/q_σ(x_s|x_t,x_0) + log p(x_0|x_1)

    Arguments as in `elbo.elbo`. The sum over levels is compensated (Kahan), so that float32 holds
    log-weights of tens of thousands of nats to their last digit.
    """
    chain = make_chain(schedule, net, kind=kind, variance=variance, eta=eta, timesteps=timesteps, clip=clip)
    first_key, chain_key = jax.random.split(key)
    eps = jax.random.normal(first_key, x0.shape)
    signal, noise = schedule.signal(chain.t[0]), schedule.noise(chain.t[0])
    total = log_ratio(eps, signal * x0, noise, 0.0, 1.0)

    def step(carry, i):
        eps, total, lost = carry
        pair = jnp.full(x0.shape[:1], i)
        q, p = compare(chain, x0, eps, pair)
        z = jax.random.normal(jax.random.fold_in(chain_key, i), x0.shape)
        rho, rest = forward(chain, jnp.asarray(chain.s)[i], jnp.asarray(chain.t)[i])  # q's kernel has the same ρ
        return (rho * eps + rest * z, *_kahan(total, lost, log_ratio(z, *q, *p))), None

    last = len(chain.t) - 1
    (eps, total, lost), _ = jax.lax.scan(step, (eps, total, jnp.zeros_like(total)), jnp.arange(last))
    _, p = compare(chain, x0, eps, jnp.full(x0.shape[:1], last))
    total, lost = _kahan(total, lost, log_likelihood(x0, *p, decoder=decoder, bins=bins))
    return total


def _kahan(total, lost, term):
    """total + term, and the rounding error to be taken off the next term."""
    term = term - lost
    new = total + term
    return new, (new - total) - term
