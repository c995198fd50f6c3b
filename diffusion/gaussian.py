"""The Gaussians of the forward process: noising, what a network predicts, and the kernel q_σ(x_s | x_t, x_0).

Images are arrays (B, ...) with any trailing shape. Noise levels are arrays (B,), or one scalar for the whole batch.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Real

from diffusion.schedule import Schedule

Images = Float[Array, 'B *shape']
Level = Real[ArrayLike, '*B']  # (B,) or ()
Coefficient = Float[Array, '...']  # broadcasts against images: (B, 1, …, 1) or ()
Net = Callable[[Images, Real[Array, 'B']], Images]  # (x_t, t) -> output
Clip = bool | Literal['x0-only']
Variance = str | Float[ArrayLike, 'num_steps']

TO_FLOAT = 'levels u = 0 … 255 become x0 = u/127.5 − 1 (diffusion.data.to_float)'  # the way out of an error


class Prediction(NamedTuple):
    """A clean image and the noise that together make x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·eps.

    Attributes:
        x0: (B, ...), the clean images.
        eps: (B, ...), the noise.
    """

    x0: Images
    eps: Images


class Kind(NamedTuple):
    """What a network outputs, as two pure functions of signal = √ᾱ_t and noise = √(1−ᾱ_t).

    Attributes:
        target: (signal, noise, x0, eps) -> output (B, ...), what a perfect network outputs at x_t.
        predict: (signal, noise, output, x_t) -> Prediction, the inverse of `target`; its x0 is NaN at a signal of 0
            if the output does not determine x_0 there.
    """

    target: Callable[[Coefficient, Coefficient, Images, Images], Images]
    predict: Callable[[Coefficient, Coefficient, Images, Images], Prediction]


def _predict_from_eps(signal: Coefficient, noise: Coefficient, output: Images, x_t: Images) -> Prediction:
    x0 = (x_t - noise * output) / jnp.where(signal > 0, signal, 1)
    with jax.debug_nans(False):  # the constant NaN is no result
        return Prediction(jnp.where(signal > 0, x0, jnp.nan), output)


def _predict_from_x0(signal: Coefficient, noise: Coefficient, output: Images, x_t: Images) -> Prediction:
    return Prediction(output, (x_t - signal * output) / noise)


def _predict_from_v(signal: Coefficient, noise: Coefficient, output: Images, x_t: Images) -> Prediction:
    return Prediction(signal * x_t - noise * output, noise * x_t + signal * output)


KINDS = {
    'eps': Kind(lambda signal, noise, x0, eps: eps, _predict_from_eps),
    'x0': Kind(lambda signal, noise, x0, eps: x0, _predict_from_x0),
    'v': Kind(lambda signal, noise, x0, eps: signal * eps - noise * x0, _predict_from_v),
}


def evaluate(net: Net, x_t: Images, t: Real[Array, 'B']) -> Images:
    """Call a network, and check the shape of its output, which would otherwise be broadcast to other numbers.

    Args:
        net: the network, (x_t (B, ...), t (B,)) -> (B, ...).
        x_t: (B, ...), its input.
        t: (B,), the noise levels.

    Returns:
        (B, ...) float32, the output.

    Raises:
        ValueError: the output has another shape than `x_t`.
    """
    output = net(x_t, t)
    if jnp.shape(output) == _doubled(x_t):
        raise ValueError(
            f'the network returns the shape {jnp.shape(output)} for x_t of the shape {jnp.shape(x_t)}, as one with a '
            "learned variance does: use variance 'learned', or gaussian.mean_half(net) with any other"
        )
    if jnp.shape(output) != jnp.shape(x_t):
        raise ValueError(
            f'the network returns the shape {jnp.shape(output)} for x_t of the shape {jnp.shape(x_t)}, but must return '
            'one value for each value of x_t'
        )
    return jnp.asarray(output, jnp.float32)


def evaluate_learned(net: Net, x_t: Images, t: Real[Array, 'B']) -> tuple[Images, Images]:
    """Call a network that learns the variance, check the shape of its output, and split it.

    Args:
        net: the network, (x_t (B, ..., C), t (B,)) -> (B, ..., 2C): along the last axis, the output of any network of
            its kind, then v.
        x_t: (B, ..., C), its input.
        t: (B,), the noise levels.

    Returns:
        The output (B, ..., C), and v (B, ..., C), see `learned_std`; float32.

    Raises:
        ValueError: the output has another shape.
    """
    output = net(x_t, t)
    if jnp.ndim(x_t) < 2 or jnp.shape(output) != _doubled(x_t):
        raise ValueError(
            f'the network returns the shape {jnp.shape(output)} for x_t of the shape {jnp.shape(x_t)}, but with '
            "variance 'learned' it must return twice as many values along the last axis; a network without a learned "
            "variance needs variance 'small' or 'large'"
        )
    output, v = jnp.split(jnp.asarray(output, jnp.float32), 2, axis=-1)
    return output, v


def mean_half(net: Net) -> Net:
    """Return a network that learns the variance without it, for whatever needs the mean alone.

    Args:
        net: the network, (x_t (B, ..., C), t (B,)) -> (B, ..., 2C).

    Returns:
        The network, (x_t (B, ..., C), t (B,)) -> (B, ..., C).
    """
    return lambda x_t, t: evaluate_learned(net, x_t, t)[0]


def _doubled(x_t: Images) -> tuple[int, ...]:
    """The shape of the output of a network that learns the variance."""
    return (*jnp.shape(x_t)[:-1], 2 * jnp.shape(x_t)[-1])


def require_images(x0: Images) -> None:
    """Check that clean images lie in [−1, 1]; images that are traced by JAX are not checked.

    Args:
        x0: (B, ...), clean images.

    Raises:
        ValueError: a value is outside, or is NaN.
    """
    if isinstance(x0, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # keeps concrete images concrete under jit
        lowest, highest = float(jnp.min(x0)), float(jnp.max(x0))
    if not -1 - 1e-5 <= lowest <= highest <= 1 + 1e-5:
        raise ValueError(f'x0 goes from {lowest:g} to {highest:g}, but must lie in [−1, 1]; {TO_FLOAT}')


def like(coefficient: Float[Array, '*B'], x: Images) -> Coefficient:
    """Append axes of size 1 to a coefficient, so that it multiplies each image of `x` by its own value.

    Args:
        coefficient: (B,) or scalar.
        x: (B, ...).

    Returns:
        (B, 1, …, 1) with as many axes as `x`, or the scalar itself.

    Raises:
        ValueError: there are not as many coefficients as images.
    """
    if coefficient.ndim == 0:
        return coefficient
    if coefficient.shape != jnp.shape(x)[: coefficient.ndim]:
        raise ValueError(f'there are levels of the shape {coefficient.shape} for images of the shape {jnp.shape(x)}')
    return jnp.expand_dims(coefficient, tuple(range(coefficient.ndim, jnp.ndim(x))))


def _require_same_shape(**arrays: Images) -> None:
    """Raise ValueError unless the two arrays have the same shape: JAX would broadcast them."""
    (first, x), (second, y) = arrays.items()
    if jnp.shape(x) != jnp.shape(y):
        raise ValueError(f'{second} has the shape {jnp.shape(y)}, but {first} has {jnp.shape(x)}')


def q_sample(schedule: Schedule, x0: Images, t: Level, eps: Images) -> Images:
    """Add noise to clean images: x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (DDPM Eq. 4).

    Args:
        schedule: the noise schedule.
        x0: (B, ...), clean images.
        t: (B,) or scalar, the noise levels, 0 to T.
        eps: (B, ...), standard normal noise.

    Returns:
        (B, ...), x_t.

    Raises:
        ValueError: x0 are whole numbers, or eps has another shape.
    """
    if not jnp.issubdtype(jnp.result_type(x0), jnp.floating):
        raise ValueError(f'x0 is {jnp.result_type(x0)}, but must be real numbers in [−1, 1]; {TO_FLOAT}')
    _require_same_shape(x0=x0, eps=eps)
    return like(schedule.signal(t), x0) * x0 + like(schedule.noise(t), x0) * eps


def target(schedule: Schedule, kind: str, x0: Images, t: Level, eps: Images) -> Images:
    """What a network of this `kind` should output at x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε.

        'eps'   ε                                      DDPM §3.2
        'x0'    x_0
        'v'     √ᾱ_t·ε − √(1−ᾱ_t)·x_0                  progressive distillation (arXiv:2202.00512) §4

    Args:
        schedule: the noise schedule.
        kind: a key of `KINDS`.
        x0: (B, ...), clean images.
        t: (B,) or scalar, the noise levels, 0 to T.
        eps: (B, ...), the noise in x_t.

    Returns:
        (B, ...), the target.

    Raises:
        ValueError: the kind is unknown, or eps has another shape than x0.
    """
    _require_same_shape(x0=x0, eps=eps)
    return _kind(kind).target(like(schedule.signal(t), x0), like(schedule.noise(t), x0), x0, eps)


def predict(schedule: Schedule, kind: str, output: Images, x_t: Images, t: Level, *, clip: Clip = False) -> Prediction:
    """Convert the output of a network to the clean image and the noise that it implies; the inverse of `target`.

        'eps'   x̂_0 = (x_t − √(1−ᾱ_t)·ε̂)/√ᾱ_t         DDPM Eq. 15, DDIM Eq. 9
        'x0'    ε̂ = (x_t − √ᾱ_t·x̂_0)/√(1−ᾱ_t)
        'v'     x̂_0 = √ᾱ_t·x_t − √(1−ᾱ_t)·v̂,   ε̂ = √(1−ᾱ_t)·x_t + √ᾱ_t·v̂

    Args:
        schedule: the noise schedule.
        kind: a key of `KINDS`.
        output: (B, ...), the output of the network.
        x_t: (B, ...), its input.
        t: (B,) or scalar, the noise levels, 1 to T.
        clip: True clips x̂_0 to [−1, 1] and derives ε̂ again, so that the two still make x_t; 'x0-only' clips x̂_0 and
            keeps ε̂, as diffusers' DDIM does.

    Returns:
        x̂_0 and ε̂, each (B, ...).

    Raises:
        ValueError: the kind or `clip` is unknown; the output has another shape than x_t; or x_0 cannot be derived: kind
            'eps' at a level where ᾱ_t = 0. If `t` is traced, x̂_0 is NaN there.
    """
    if clip not in (False, True, 'x0-only'):
        raise ValueError(f"clip is {clip!r}, but must be False, True or 'x0-only'")
    _require_same_shape(x_t=x_t, output=output)
    require_signal(schedule, kind, t)
    signal, noise = like(schedule.signal(t), x_t), like(schedule.noise(t), x_t)
    prediction = _kind(kind).predict(signal, noise, output, x_t)
    if clip:
        x0 = jnp.clip(prediction.x0, -1, 1)
        prediction = Prediction(x0, prediction.eps if clip == 'x0-only' else (x_t - signal * x0) / noise)
    return prediction


def require_signal(schedule: Schedule, kind: str, t: Level) -> None:
    """Check that the output of a network of this `kind` determines x_0 at the noise levels `t`.

    Args:
        schedule: the noise schedule.
        kind: a key of `KINDS`.
        t: noise levels of any shape; traced levels are not checked.

    Raises:
        ValueError: x_0 cannot be derived at one of the levels, or a level is outside [0, T].
    """
    with jax.ensure_compile_time_eval():  # keeps concrete levels concrete under jit
        signal = schedule.signal(t)
    if isinstance(signal, jax.core.Tracer) or np.all(np.asarray(signal) > 0) or _determines_x0_from_noise(kind):
        return
    others = ' or '.join(repr(other) for other in KINDS if _determines_x0_from_noise(other))
    raise ValueError(
        f"x_0 cannot be derived from {kind} at a level where alpha_bar is 0 (level T of the 'jsd' schedule); "
        f'use kind {others}, or timesteps that start below that level'
    )


def _determines_x0_from_noise(kind: str) -> bool:
    """Return whether the output of a network determines x_0 where ᾱ_t = 0, so that x_t is pure noise."""
    with jax.ensure_compile_time_eval():
        zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
        with jax.debug_nans(False):  # NaN is an answer here
            return bool(jnp.isfinite(_kind(kind).predict(zero, one, zero, zero).x0))


def posterior(
    schedule: Schedule, prediction: Prediction, s: Level, t: Level, *, eta: float
) -> tuple[Images, Coefficient]:
    """The kernel: mean and standard deviation of q_σ(x_s | x_t, x_0), for any 0 ≤ s < t.

        mean = √ᾱ_s·x0 + √(1−ᾱ_s−σ²)·eps                                               DDIM Eq. 7, 12
        σ    = η·√((1−ᾱ_s)/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_s)                                       DDIM Eq. 16

    η = 1 is the posterior of DDPM (Eq. 7); η = 0 is the deterministic step of DDIM. With the true pair (x_0, ε) this is
    the forward process; with a predicted pair (x̂_0, ε̂) it is the model. At s = 0 the mean is x0 and σ is 0.

    Args:
        schedule: the noise schedule.
        prediction: x0 and eps, each (B, ...).
        s: (B,) or scalar, the noise levels after the step.
        t: (B,) or scalar, the noise levels before the step, s < t ≤ T.
        eta: η, a Python float in [0, 1].

    Returns:
        The mean (B, ...), and σ in a shape that broadcasts against it.

    Raises:
        ValueError: `eta` is outside [0, 1]; eps has another shape than x0; or a level is not s < t. Traced levels are
            not checked.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f'eta is {eta}, but must lie in [0, 1]: 0 is DDIM, 1 is DDPM')
    if not any(isinstance(level, jax.core.Tracer) for level in (s, t)) and np.any(np.asarray(s) >= np.asarray(t)):
        raise ValueError(f'the kernel goes from level t to a lower one, but s is {s} and t is {t}')
    x0, eps = prediction
    _require_same_shape(x0=x0, eps=eps)
    eta = float(eta)
    ratio = schedule.noise(s) / schedule.noise(t)
    std = eta * ratio * jnp.sqrt(schedule.beta(s, t))
    # 1−ᾱ_s−σ² = (1−ᾱ_s)·(1 − η²·β/(1−ᾱ_t)), and 1 − β/(1−ᾱ_t) = (ᾱ_t/ᾱ_s)·(1−ᾱ_s)/(1−ᾱ_t): no cancellation.
    kept = jnp.exp(0.5 * schedule.log_ratio(s, t)) * ratio
    # For η = 1 no root is taken, whose derivative would be infinite where `kept` is 0: at s = 0, and where ᾱ_t = 0.
    direction = schedule.noise(s) * (kept if eta == 1 else jnp.sqrt((1 - eta**2) + (eta * kept) ** 2))
    mean = like(schedule.signal(s), x0) * x0 + like(direction, x0) * eps
    return mean, like(std, x0)


# {name: (schedule, s, t) -> the variances that replace σ² of the kernel, or None if there are none}, see `own_variance`
VARIANCES: dict[str, Callable[[Schedule, np.ndarray, np.ndarray], Float[Array, 'num_steps'] | None]] = {
    'small': lambda schedule, s, t: None,
    'large': lambda schedule, s, t: schedule.beta(s, t),
    'learned': lambda schedule, s, t: None,
}


def own_variance(
    schedule: Schedule,
    variance: Variance,
    s: Int[np.ndarray, 'num_steps'],
    t: Int[np.ndarray, 'num_steps'],
    *,
    eta: float,
) -> Float[Array, 'num_steps'] | None:
    """The variances of a reverse chain that replace σ² of the kernel, one for each pair (t, s).

        'small'              none: the kernel's σ² (at η = 1 DDPM's β̃)
        'large'              1 − ᾱ_t/ᾱ_s: DDPM's σ² = β, the DDIM paper's σ̂²; for η = 1 alone
        'learned'            none: those of the network, see `learned_std`; for η = 1 alone
        array (num_steps,)   these variances, the first pair first

    Args:
        schedule: the noise schedule.
        variance: a key of `VARIANCES`, or an array, finite and not negative.
        s: the noise levels after each step.
        t: the noise levels before each step.
        eta: η, in [0, 1].

    Returns:
        (num_steps,) float32, or None for 'small' and 'learned'.

    Raises:
        ValueError: the variance is unknown, has another shape, is negative or not finite; or `require_room_for_noise`
            refuses it.
    """
    if not isinstance(variance, str):
        if not isinstance(variance, jax.core.Tracer):
            variance = np.asarray(variance, np.float32)
            if not np.all((variance >= 0) & np.isfinite(variance)):
                raise ValueError(f'variance is {variance}, but must be finite and not negative')
        if np.shape(variance) != t.shape:
            raise ValueError(f'variance has the shape {np.shape(variance)}, but the chain has {len(t)} steps')
        return jnp.asarray(variance, jnp.float32)
    if variance not in VARIANCES:
        raise ValueError(f'variance is {variance!r}, but must be {", ".join(map(repr, VARIANCES))} or an array')
    require_room_for_noise(variance, eta)
    return VARIANCES[variance](schedule, s, t)


def is_learned(variance: Variance) -> bool:
    """Return whether a variance is 'learned', so that the network returns twice as many values."""
    return isinstance(variance, str) and variance == 'learned'


def small_std(
    schedule: Schedule, s: Int[np.ndarray, 'num_steps'], t: Int[np.ndarray, 'num_steps'], *, eta: float
) -> Float[Array, 'num_steps']:
    """σ of the kernel for each pair (t, s) of a chain; where s = 0 and it is 0, that of the last pair with s > 0.

    With all T levels the decoder has √β̃_2 (Ho's code; `posterior_log_variance_clipped` in OpenAI's, which takes that of
    the shortened chain if there is one). If no pair has s > 0, it is √(1−ᾱ_t).

    Args:
        schedule: the noise schedule.
        s: the noise levels after each step.
        t: the noise levels before each step.
        eta: η, in [0, 1].

    Returns:
        (num_steps,) float32.
    """
    nothing = Prediction(*jnp.zeros((2, len(t)), jnp.float32))
    _, std = posterior(schedule, nothing, s, t, eta=eta)
    noisy = np.flatnonzero(s > 0)
    return jnp.where(s > 0, std, std[noisy[-1]] if len(noisy) else schedule.noise(t))


def log_widening(
    schedule: Schedule,
    std: Float[Array, 'num_steps'],
    s: Int[np.ndarray, 'num_steps'],
    t: Int[np.ndarray, 'num_steps'],
) -> Float[Array, 'num_steps']:
    """log(√β/std) with β = 1 − ᾱ_t/ᾱ_s, of each pair (t, s), which `learned_std` needs.

    Args:
        schedule: the noise schedule.
        std: √β̃, positive, as `small_std` returns it for η = 1.
        s: the noise levels after each step.
        t: the noise levels before each step.

    Returns:
        (num_steps,) float32, at least 0.
    """
    return jnp.log(jnp.sqrt(schedule.beta(s, t)) / std)


def learned_std(v: Images, std: Coefficient, widening: Coefficient) -> Images:
    """σ of p(x_s | x_t) for each pixel, from a network that learns the variance.

        log σ² = f·log β + (1−f)·log β̃,    f = (v+1)/2                          Improved DDPM (arXiv:2102.09672) Eq. 15

    β and β̃ are those of the pair (t, s), also in a shortened chain. v is what the network returns: −1 stands for β̃ and
    1 for β, as in OpenAI's code. It is computed as √β̃·(√β/√β̃)^f, which has all digits of float32.

    Args:
        v: (B, ...), of any size.
        std: √β̃, see `small_std`; 0 gives 0.
        widening: log(√β/√β̃), see `log_widening`.

    Returns:
        (B, ...).
    """
    return std * jnp.exp((v + 1) / 2 * widening)


def require_room_for_noise(variance: Variance, eta: float) -> None:
    """Check that variance 'large' or 'learned' goes with η = 1.

    With the mean of the kernel, the variance of x_s is 1 − ᾱ_s only if σ² is the kernel's own. At most levels DDPM's β
    is close to the kernel's σ² for η = 1, but far larger than that for a smaller η: the images would be mostly noise. A
    learned variance lies between the two for η = 1.

    Args:
        variance: as in `own_variance`.
        eta: η, in [0, 1].

    Raises:
        ValueError: it is 'large' or 'learned', and η is not 1.
    """
    if isinstance(variance, str) and variance == 'large' and eta != 1:
        raise ValueError(
            f"variance 'large' (σ² = β, σ̂ in the DDIM paper) belongs to eta=1, not to eta={eta:g}: it adds more noise "
            "than the mean leaves room for; use variance 'small', the η family, or eta=1"
        )
    if is_learned(variance) and eta != 1:
        raise ValueError(
            f"variance 'learned' belongs to eta=1, not to eta={eta:g}: it was learned for the mean of eta=1; use "
            "variance 'small', the η family, or eta=1"
        )


def chain(
    schedule: Schedule, kind: str, timesteps: Int[ArrayLike, 'num_steps+1']
) -> tuple[Int[np.ndarray, 'num_steps'], Int[np.ndarray, 'num_steps']]:
    """Split the noise levels of a chain into its pairs (t, s).

    Args:
        schedule: the noise schedule.
        kind: a key of `KINDS`.
        timesteps: the noise levels, first > … > last = 0.

    Returns:
        t and s, each (num_steps,).

    Raises:
        ValueError: the levels do not decrease to 0 or are outside [0, T], or the kind cannot start at the first level
            (see `require_signal`).
    """
    levels = np.asarray(timesteps)
    if levels.ndim != 1 or len(levels) < 2 or levels[-1] != 0 or np.any(np.diff(levels) >= 0):
        raise ValueError(f'timesteps must decrease to 0 through at least one level, not {levels}')
    require_signal(schedule, kind, levels[0])
    return levels[:-1], levels[1:]


def _kind(kind: str) -> Kind:
    if kind not in KINDS:
        raise ValueError(f'kind is {kind!r}, but must be one of {", ".join(KINDS)}')
    return KINDS[kind]
