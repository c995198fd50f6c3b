"""The flow bound: a bound on log p(x_0) from the density of x_1 under the probability-flow ODE.

The schedule is a variance-preserving SDE with piecewise-constant β. An ODE has the same marginals (score-based SDEs,
arXiv:2011.13456 Eq. 13). With u = log √((1−ᾱ)/ᾱ) as its time it reads

    dx/du = √(1−ᾱ)·( ε̂(x, t) − √(1−ᾱ)·x )

and is smooth where β jumps.
"""

import math
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion import gaussian
from diffusion.gaussian import Clip, Images, Net, Variance
from diffusion.likelihood import draws
from diffusion.likelihood.chain import compare, make_chain
from diffusion.likelihood.decoder import LOG_SQRT_2PI, per_image
from diffusion.schedule import Schedule

Nats = Float[Array, 'B']

EXACT_UP_TO = 16  # dimensions; beyond, two probes, since a single one has no standard error


class Density(NamedTuple):
    """log p_ode, its error, and the cost.

    Attributes:
        nats: (B,).
        probe_error: (B,) nats, standard error from the spread of the probes; 0 if exact, NaN for a single probe.
        num_steps: scalar, the number of steps of the solver.
    """

    nats: Nats
    probe_error: Nats
    num_steps: Int[Array, '']


class Flow(NamedTuple):
    """The terms of the flow bound in nats, their error, and the cost.

    Attributes:
        reconstruction: (B,), log p_θ(x_0|x_1).
        entropy: (B,), −log q(x_1|x_0).
        density: (B,), log p_ode(x_1).
        probe_error: (B,), standard error of `density`, see `Density`.
        num_steps: scalar, the number of steps of the solver.
    """

    reconstruction: Nats
    entropy: Nats
    density: Nats
    probe_error: Nats
    num_steps: Int[Array, '']

    def total(self) -> Nats:
        """The bound of each image: (B,) nats."""
        return self.reconstruction + self.entropy + self.density


def flow_bound(key: draws.Keys, schedule: Schedule, net: Net, x0: Images, *, kind: str, **how: Any) -> Nats:
    """E_{q(x_1|x_0)}[ log p_ode(x_1) − log q(x_1|x_0) + log p_θ(x_0|x_1) ] ≤ log p(x_0), at one draw.

    This p is not the model of the other bounds: x_1 comes from the ODE, and x_0 from the last step of the chain.

    Args:
        key: typed PRNG key; or (B,) keys, one for each image, whose draws then do not depend on the other images.
        schedule: the noise schedule.
        net: the network, (x_t (B, ...), t (B,) real) -> (B, ...).
        x0: (B, ...), images in [−1, 1].
        kind: what the network outputs, a key of `gaussian.KINDS`.
        **how: the other arguments of `flow`.

    Returns:
        (B,) nats.

    Raises:
        ValueError: `flow` refuses the arguments.
    """
    return flow(key, schedule, net, x0, kind=kind, **how).total()


def flow(
    key: draws.Keys,
    schedule: Schedule,
    net: Net,
    x0: Images,
    *,
    kind: str,
    decoder: str = 'discretized',
    variance: Variance = 'small',
    probes: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    clip: Clip = False,
    bins: int = 256,
) -> Flow:
    """One draw of the terms of `flow_bound`.

    Args:
        key: typed PRNG key; or (B,) keys, one for each image, whose draws then do not depend on the other images.
        schedule: the noise schedule.
        net: the network, (x_t (B, ...), t (B,) real) -> (B, ...).
        x0: (B, ...), images in [−1, 1].
        kind: what the network outputs, a key of `gaussian.KINDS`.
        decoder: p(x_0 | x_1), a key of `decoder.DECODERS`.
        variance: of the chain whose last step is p(x_0 | x_1), see `chain.make_chain`. The ODE needs the mean alone.
        probes: the number of vectors that estimate the divergence, see `log_density`.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver.
        clip: whether and how x̂_0 of the last step is clipped; the ODE does not clip.
        bins: the number of values of a pixel.

    Returns:
        The terms.

    Raises:
        ValueError: `probes` is negative; x0 are outside [−1, 1], as far as that can be seen; or `log_density` or
            `chain.make_chain` refuse the other arguments.
    """
    gaussian.require_images(x0)  # before the solver, which fails on NaN
    chain = make_chain(schedule, net, kind=kind, variance=variance, clip=clip, decoder=decoder, bins=bins)
    noise_key, probe_key = draws.split(key)
    eps = draws.normal(noise_key, x0.shape)
    _, p = compare(chain, x0, eps, jnp.full(x0.shape[:1], len(chain.t) - 1))
    entropy = per_image(0.5 * eps**2 + LOG_SQRT_2PI + jnp.log(schedule.noise(1)))
    x_1 = gaussian.q_sample(schedule, x0, 1, eps)
    mean_net = gaussian.mean_half(net) if gaussian.is_learned(variance) else net
    density = log_density(probe_key, schedule, mean_net, x_1, kind=kind, probes=probes, rtol=rtol, atol=atol)
    return Flow(chain.decoder(x0, *p), entropy, *density)


def log_density(
    key: draws.Keys,
    schedule: Schedule,
    net: Net,
    x: Images,
    *,
    kind: str,
    level: int = 1,
    probes: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Density:
    """log p_ode(x) at a noise level: log N(x_T; 0, I) + ∫ div(dx/du) du (arXiv:2011.13456 Eq. 39).

    Where ᾱ_T = 0 ('jsd'), the integral ends at the last level with ᾱ > 0. The solver is Tsitouras' 5th-order method
    (diffrax).

    Args:
        key: typed PRNG key of the probes, or (B,) keys.
        schedule: the noise schedule.
        net: the network, (x (B, ...), t (B,) real) -> (B, ...).
        x: (B, ...), noisy images at `level`.
        kind: what the network outputs, a key of `gaussian.KINDS`.
        level: the noise level of `x`.
        probes: the number of Rademacher vectors that estimate the divergence (Hutchinson), drawn once for the whole
            path; 0 computes the exact trace; None is 0 for up to `EXACT_UP_TO` dimensions, else 2.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver. The pixels and the integrals, which are far fewer, have equal weight
            in the error that is compared with both tolerances.

    Returns:
        The log-density of each image, its error and the cost.

    Raises:
        ValueError: `probes` is negative, the kind is unknown, or ᾱ is 0 at `level`.
    """
    table = schedule.log_alpha_bar
    if not isinstance(table, jax.core.Tracer) and np.isneginf(np.asarray(table)[level]):
        raise ValueError(
            f'the probability-flow ODE starts at level {level}, but ᾱ is 0 there: this schedule has no '
            'level between clean data and pure noise; use more levels, or no flow bound'
        )
    size = math.prod(x.shape[1:])
    probes = num_probes(probes, size)
    if probes:
        # Draw with the batch axis first, so that images that pad a batch do not change the draws of the others.
        vectors = draws.signs(key, (len(x), probes, *x.shape[1:])).swapaxes(0, 1)
    else:
        basis = jnp.eye(size, dtype=jnp.float32).reshape(size, 1, *x.shape[1:])
        vectors = jnp.broadcast_to(basis, (size, *x.shape))
    minus_log_alpha_bar = -schedule.log_alpha_bar
    levels = jnp.arange(schedule.T + 1, dtype=jnp.float32)
    end = schedule.T - jnp.isinf(minus_log_alpha_bar[-1]).astype(jnp.int32)

    def velocity(x, u):
        t = jnp.interp(jax.nn.softplus(2 * u), minus_log_alpha_bar, levels)  # −log ᾱ = log(1 + e^{2u})
        noise = schedule.noise(t)
        output = gaussian.evaluate(net, x, jnp.full(x.shape[:1], t))
        return noise * (gaussian.predict(schedule, kind, output, x, t).eps - noise * x)

    def rates(u, state, _):
        x, _ = state
        value, derivative = jax.linearize(lambda x: velocity(x, u), x)
        divergences = jax.vmap(lambda v: per_image(v * derivative(v)))(vectors)
        return value, divergences if probes else divergences.sum(0, keepdims=True)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(rates),
        diffrax.Tsit5(),
        t0=-0.5 * schedule.log_snr(level),
        t1=-0.5 * schedule.log_snr(end),
        dt0=None,
        y0=(x, jnp.zeros((probes or 1, *x.shape[:1]), jnp.float32)),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, norm=_norm),
    )
    x_T, integrals = (leaf[-1] for leaf in solution.ys)
    error = jnp.zeros(x.shape[:1], jnp.float32)
    if probes > 1:
        error = integrals.std(0, ddof=1) / math.sqrt(probes)
    elif probes == 1:
        with jax.debug_nans(False):  # NaN is the answer
            error = jnp.full_like(error, jnp.nan)
    nats = integrals.mean(0) - per_image(0.5 * x_T**2 + LOG_SQRT_2PI)
    return Density(nats, error, solution.stats['num_steps'])


def _norm(tree: tuple[jax.Array, ...]) -> jax.Array:
    """The root of the sum of the mean squares of the arrays of a tree: few values count as much as many."""
    return jnp.sqrt(sum(jnp.mean(leaf**2) for leaf in jax.tree.leaves(tree)))


def num_probes(probes: int | None, size: int) -> int:
    """Return the number of probes that `log_density` uses.

    Args:
        probes: the argument of `log_density`.
        size: the number of values of an image.

    Returns:
        The number of probes; 0 stands for the exact divergence.

    Raises:
        ValueError: `probes` is negative.
    """
    if probes is None:
        return 0 if size <= EXACT_UP_TO else 2
    if probes < 0:
        raise ValueError(f'probes is {probes}, but must be at least 0')
    return probes
