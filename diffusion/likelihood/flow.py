"""The flow bound: the exact density of x_1 under the probability-flow ODE, made a bound on images.

The schedule is a variance-preserving SDE with piecewise-constant β, whose marginals are also those of an
ODE (score-based SDEs, arXiv:2011.13456 Eq. 13). With λ = log √((1−ᾱ)/ᾱ) for time it reads

    dx/dλ = √(1−ᾱ)·( ε̂(x, t) − √(1−ᾱ)·x )

and has no jumps where β has them.
"""

import math
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp

from diffusion import gaussian
from diffusion.likelihood.chain import compare, make_chain
from diffusion.likelihood.decoder import LOG_SQRT_2PI, log_likelihood, per_image

EXACT_UP_TO = 16  # dimensions; beyond, two probes: one would not say how far off it is


class Density(NamedTuple):
    """log p_ode, and what it cost."""

    nats: jax.Array  # (B,)
    probe_error: jax.Array  # (B,), standard error from the probes' spread; 0 if exact, NaN for one probe
    num_steps: jax.Array  # (), of the solver


class Flow(NamedTuple):
    """The terms of the flow bound in nats, and what they cost."""

    reconstruction: jax.Array  # (B,), log p_θ(x_0|x_1)
    entropy: jax.Array  # (B,), −log q(x_1|x_0)
    density: jax.Array  # (B,), log p_ode(x_1)
    probe_error: jax.Array  # (B,), standard error of density, as in Density
    num_steps: jax.Array  # (), of the solver

    def total(self):
        """The bound of each image: (B,) nats."""
        return self.reconstruction + self.entropy + self.density


def flow_bound(
    key,
    schedule,
    net,
    x0,
    *,
    kind,
    decoder='discretized',
    variance='small',
    probes=None,
    rtol=1e-5,
    atol=1e-5,
    clip=False,
    bins=256,
):
    """E_{q(x_1|x_0)}[ log p_ode(x_1) − log q(x_1|x_0) + log p_θ(x_0|x_1) ] ≤ log p(x_0), at one draw: (B,) nats.

    p is here another model than the chain's: x_1 from the ODE, then x_0 from the chain's last step.
    Arguments as in `flow`.
    """
    how = dict(decoder=decoder, variance=variance, probes=probes, rtol=rtol, atol=atol, clip=clip, bins=bins)
    return flow(key, schedule, net, x0, kind=kind, **how).total()


def flow(
    key,
    schedule,
    net,
    x0,
    *,
    kind,
    decoder='discretized',
    variance='small',
    probes=None,
    rtol=1e-5,
    atol=1e-5,
    clip=False,
    bins=256,
):
    """The terms of `flow_bound`.

    key, schedule, net, x0, kind, decoder, variance, clip, bins: as in `elbo.elbo` (clip is for the last
    step; the ODE takes x̂_0 as it comes); probes, rtol, atol: as in `log_density`. Returns Flow.
    """
    chain = make_chain(schedule, net, kind=kind, variance=variance, eta=1.0, clip=clip)
    noise_key, probe_key = jax.random.split(key)
    eps = jax.random.normal(noise_key, x0.shape)
    _, p = compare(chain, x0, eps, jnp.full(x0.shape[:1], len(chain.t) - 1))
    entropy = per_image(0.5 * eps**2 + LOG_SQRT_2PI + jnp.log(schedule.noise(1)))
    x_1 = gaussian.q_sample(schedule, x0, 1, eps)
    density = log_density(probe_key, schedule, net, x_1, kind=kind, probes=probes, rtol=rtol, atol=atol)
    return Flow(log_likelihood(x0, *p, decoder=decoder, bins=bins), entropy, *density)


def log_density(key, schedule, net, x, *, kind, level=1, probes=None, rtol=1e-5, atol=1e-5):
    """log p_ode of x at a noise level: log N(x_T; 0, I) + ∫ div(dx/dλ) dλ.         arXiv:2011.13456 Eq. 39

    Where ᾱ_T = 0 (jsd) the last level with ᾱ > 0 stands for T.

    key: typed PRNG key of the probes; net: (x (B, ...), t (B,) real) → (B, ...), its output of `kind`;
    x: (B, ...) at `level`; probes: how many Rademacher vectors estimate the divergence (Hutchinson), one
    draw for the whole path; 0 is the exact trace; None is exact up to 16 dimensions and 2 probes beyond;
    rtol, atol: of the solver (Tsitouras 5, diffrax), for x and the integrals together, one a probe.
    Returns Density.
    """
    size = math.prod(x.shape[1:])
    probes = num_probes(probes, size)
    if probes:
        # Images first, so that those that fill up a batch do not change the draws of the others.
        vectors = jax.random.rademacher(key, (len(x), probes, *x.shape[1:]), jnp.float32).swapaxes(0, 1)
    else:
        basis = jnp.eye(size).reshape(size, 1, *x.shape[1:])
        vectors = jnp.broadcast_to(basis, (size, *x.shape))
    minus_log_alpha_bar = -schedule.log_alpha_bar
    levels = jnp.arange(schedule.T + 1, dtype=jnp.float32)
    end = schedule.T - jnp.isinf(minus_log_alpha_bar[-1]).astype(jnp.int32)

    def velocity(x, lam):
        t = jnp.interp(jax.nn.softplus(2 * lam), minus_log_alpha_bar, levels)  # −log ᾱ = log(1 + e^{2λ})
        noise = schedule.noise(t)
        output = net(x, jnp.full(x.shape[:1], t)).astype(jnp.float32)
        return noise * (gaussian.predict(schedule, kind, output, x, t).eps - noise * x)

    def rates(lam, state, _):
        x, _ = state
        value, derivative = jax.linearize(lambda x: velocity(x, lam), x)
        divergences = jax.vmap(lambda v: per_image(v * derivative(v)))(vectors)
        return value, divergences if probes else divergences.sum(0, keepdims=True)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(rates),
        diffrax.Tsit5(),
        t0=-0.5 * schedule.log_snr(level),
        t1=-0.5 * schedule.log_snr(end),
        dt0=None,
        y0=(x, jnp.zeros((probes or 1, *x.shape[:1]))),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
    )
    x_T, integrals = (leaf[-1] for leaf in solution.ys)
    error = jnp.zeros(x.shape[:1])
    if probes:
        error = integrals.std(0, ddof=1) / math.sqrt(probes) if probes > 1 else jnp.full(x.shape[:1], jnp.nan)
    nats = integrals.mean(0) - per_image(0.5 * x_T**2 + LOG_SQRT_2PI)
    return Density(nats, error, solution.stats['num_steps'])


def num_probes(probes, size):
    """How many probes `log_density` takes for images of `size` values; 0 is the exact divergence."""
    if probes is None:
        return 0 if size <= EXACT_UP_TO else 2
    if probes < 0:
        raise ValueError(f'probes is {probes}, but must be at least 0')
    return probes
