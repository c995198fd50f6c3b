"""The sampler: one loop over pairs (t, s) of noise levels, around one rule that carries x_t to x_s."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from diffusion import gaussian
from diffusion.gaussian import Clip, Images, Net, Prediction, Variance
from diffusion.schedule import Schedule

Batch = Float[Array, 'N *shape']
State = Any  # a pytree of arrays that a rule carries from step to step


class Rule(NamedTuple):
    """What carries x_t to x_s, as a pair of pure functions.

    `init` maps x_T to the first state, a pytree of arrays. `step` maps

        (state, x_t, t, s, std, *, schedule, predict, noise, eta) -> (state, x_s)

    Attributes:
        init: x_T (N, ...) -> state.
        step: one step from x_t (N, ...) at level t to x_s at level s < t, both levels scalars. `std` is None, or the
            standard deviation of the noise if the variance is not 'small': a scalar, or (N, ...) if it is learned.
            `predict(x_t, t)` returns the Prediction of the network and may be called more than once. `noise(level)`
            returns standard normal noise (N, ...), the same at every call with the same level. `eta` is a Python float.
    """

    init: Callable[[Batch], State]
    step: Callable[..., tuple[State, Batch]]


def _kernel(state, x_t, t, s, std, *, schedule, predict, noise, eta):
    """x_s = mean + σ·z with mean and σ from `gaussian.posterior`; draws no noise if η = 0 and `std` is None."""
    x_s, kernel_std = gaussian.posterior(schedule, predict(x_t, t), s, t, eta=eta)
    if eta > 0 or std is not None:
        x_s += (kernel_std if std is None else std) * noise(s)
    return state, x_s


RULES = {'kernel': Rule(init=lambda x_T: (), step=_kernel)}


def sample(
    keys: Key[Array, 'N'],
    schedule: Schedule,
    net: Net,
    *,
    shape: tuple[int, ...],
    timesteps: Int[ArrayLike, 'num_steps+1'] | Int[ArrayLike, 'num_steps 2'],
    kind: str,
    eta: float,
    variance: Variance = 'small',
    clip: Clip = True,
    x_T: Images | None = None,
    rule: str = 'kernel',
    last_noise: bool = False,
) -> Batch:
    """Draw images: x_T ~ N(0, I), then x_s from x_t for each pair (t, s) of `timesteps`.

        x_s = √ᾱ_s·x̂_0 + √(1−ᾱ_s−σ²)·ε̂ + σ·z,   z ~ N(0, I)                  rule 'kernel', DDIM Eq. 12

    η = 1 with all levels is DDPM's Algorithm 2; η = 0 is DDIM. No noise is added at s = 0. Image i depends on keys[i]
    alone: the noise of level s is drawn from fold_in(keys[i], s). With η = 0 and variance 'small' the compiled program
    draws x_T and no other noise.

    Args:
        keys: (N,) typed PRNG keys, one for each image.
        schedule: the noise schedule.
        net: the network, (x_t (N, ...), t (N,)) -> (N, ...); with variance 'learned' its last axis has twice the size,
            see `gaussian.evaluate_learned`.
        shape: the shape of one image.
        timesteps: (num_steps+1,) noise levels that decrease to 0, see `schedule.timesteps`; or (num_steps, 2) pairs
            (t, s), where a pair need not start where the one before ended, see `compat.resolve`.
        kind: what the network outputs, a key of `gaussian.KINDS`.
        eta: η, a Python float in [0, 1].
        variance: 'small', 'large', 'learned' or an array (num_steps,) that replaces σ², see `gaussian.own_variance`.
        clip: whether and how x̂_0 is clipped to [−1, 1] at each step, see `gaussian.predict`.
        x_T: (N, *shape), where the chain starts; drawn if None.
        rule: what carries x_t to x_s, a key of `RULES`.
        last_noise: whether variance 'large' or an array also adds noise at s = 0.

    Returns:
        (N, *shape) float32, the images x_0.

    Raises:
        ValueError: the keys are not typed or not (N,); the levels do not decrease to 0 or are outside [0, T]; a pair is
            not s < t; the variance, the rule or the kind is unknown; the variance is 'large' or 'learned' and
            `eta` is not 1; x_T or the output of the network has another shape; or the kind is 'eps' and the first level
            has ᾱ = 0.
    """
    if rule not in RULES:
        raise ValueError(f'rule is {rule!r}, but must be one of {", ".join(RULES)}')
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.ndim != 1:
        raise ValueError(
            f'keys are {keys.dtype} of the shape {keys.shape}, but must be typed and of the shape (N,), one typed key '
            'an image: jax.random.split(jax.random.key(seed), N)'
        )
    steps = make_steps(schedule, timesteps, kind=kind, eta=eta, variance=variance, last_noise=last_noise)
    if x_T is None:
        x_T = noise(keys, steps.t[0], shape)
    if jnp.shape(x_T) != (*keys.shape, *shape):
        raise ValueError(f'x_T has the shape {jnp.shape(x_T)}, but the keys and shape ask for {(*keys.shape, *shape)}')
    return follow(keys, schedule, net, steps, len(steps.t), kind=kind, eta=eta, clip=clip, x_T=x_T, rule=rule)


class Steps(NamedTuple):
    """The steps of a chain.

    Attributes:
        t: (num_steps,) int, the noise levels before each step.
        s: (num_steps,) int, the noise levels after each step.
        std: (num_steps,) float32, the standard deviations of the noise; None for those of the rule.
        widening: (num_steps,) float32, for a learned variance, see `gaussian.learned_std`; `std` is then √β̃.
    """

    t: Int[Array | np.ndarray, 'num_steps']
    s: Int[Array | np.ndarray, 'num_steps']
    std: Float[Array | np.ndarray, 'num_steps'] | None
    widening: Float[Array | np.ndarray, 'num_steps'] | None = None


def make_steps(
    schedule: Schedule,
    timesteps: Int[ArrayLike, 'num_steps+1'] | Int[ArrayLike, 'num_steps 2'],
    *,
    kind: str,
    eta: float,
    variance: Variance = 'small',
    last_noise: bool = False,
) -> Steps:
    """Return the steps of a chain. Arguments and errors are those of `sample`."""
    t, s = _pairs(schedule, kind, np.asarray(timesteps))
    with jax.ensure_compile_time_eval():  # outside the traced program, so that all programs use the same numbers
        variances = gaussian.own_variance(schedule, variance, s, t, eta=eta)
        if gaussian.is_learned(variance):
            small = gaussian.small_std(schedule, s, t, eta=1.0)
            return Steps(t, s, jnp.where(s > 0, small, 0), gaussian.log_widening(schedule, small, s, t))
        std = None if variances is None else jnp.where((s > 0) | last_noise, jnp.sqrt(variances), 0)
    return Steps(t, s, std)


def follow(
    keys: Key[Array, 'N'],
    schedule: Schedule,
    net: Net,
    steps: Steps,
    num_steps: int | Int[Array, ''],
    *,
    kind: str,
    eta: float,
    clip: Clip,
    x_T: Images,
    rule: str,
) -> Batch:
    """Carry x_T through the first steps of a chain, see `sample`.

    If `steps` and `num_steps` are traced, one compiled program serves chains of any number of steps.

    Args:
        keys: (N,) typed PRNG keys, one for each image.
        schedule: the noise schedule.
        net: the network, see `sample`.
        steps: the steps of the chain; only the first `num_steps` are taken.
        num_steps: how many steps are taken.
        kind: what the network outputs, a key of `gaussian.KINDS`.
        eta: η, a Python float in [0, 1].
        clip: see `sample`.
        x_T: (N, ...), where the chain starts.
        rule: a key of `RULES`.

    Returns:
        (N, ...) float32, the images after the last step.
    """
    shape = jnp.shape(x_T)[1:]

    def learned(x_t: Batch, t: Int[Array, '']) -> tuple[Prediction, Images]:
        output, v = gaussian.evaluate_learned(net, x_t, jnp.full(keys.shape, t))
        return gaussian.predict(schedule, kind, output, x_t, t, clip=clip), v

    def predict(x_t: Batch, t: Int[Array, '']) -> Prediction:
        if steps.widening is not None:
            return learned(x_t, t)[0]
        output = gaussian.evaluate(net, x_t, jnp.full(keys.shape, t))
        return gaussian.predict(schedule, kind, output, x_t, t, clip=clip)

    def step(i, carry):
        t, s, std, widening = jax.tree.map(
            lambda values: jax.lax.dynamic_index_in_dim(values, i, keepdims=False), steps
        )
        of_step = dict(schedule=schedule, predict=predict, noise=functools.partial(noise, keys, shape=shape), eta=eta)
        if widening is not None:
            _, x_t = carry
            first, v = learned(x_t, t)
            std = gaussian.learned_std(v, std, widening)
            # The network has run at (x_t, t) to get v; give the rule that prediction instead of running it again.
            of_step['predict'] = lambda x, level: first if x is x_t and level is t else predict(x, level)
        return RULES[rule].step(*carry, t, s, std, **of_step)

    x_T = jnp.asarray(x_T, jnp.float32)
    steps = jax.tree.map(jnp.asarray, steps)
    _, x0 = jax.lax.fori_loop(0, num_steps, step, (RULES[rule].init(x_T), x_T))
    return x0


def noise(keys: Key[Array, 'N'], level: Int[ArrayLike, ''], shape: tuple[int, ...]) -> Batch:
    """Draw the standard normal noise of a level. That of image i depends on (keys[i], level) alone.

    Args:
        keys: (N,) typed PRNG keys, one for each image.
        level: the noise level.
        shape: the shape of one image.

    Returns:
        (N, *shape) float32.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, level), shape, jnp.float32))(keys)


def _pairs(schedule: Schedule, kind: str, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return t and s, each (num_steps,), from the levels of a chain or from pairs (t, s)."""
    if timesteps.ndim != 2:
        return gaussian.chain(schedule, kind, timesteps)
    if timesteps.shape[1] != 2 or not len(timesteps) or np.any(timesteps[:, 1] >= timesteps[:, 0]):
        raise ValueError(f'pairs (t, s) must have s < t, and there must be at least one, not {timesteps.tolist()}')
    gaussian.require_signal(schedule, kind, timesteps)  # and no level is outside [0, T]
    return timesteps[:, 0], timesteps[:, 1]
