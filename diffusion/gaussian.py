"""The Gaussians of the forward process: noising, what a network predicts, and the kernel q_σ(x_s | x_t, x_0).

Images are x (B, ...), noise levels t (B,) or a scalar; any trailing shape will do, scalars included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ('eps', 'x0', 'v')


class Prediction(NamedTuple):
    """An image and the noise that together make x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·eps; each of x_t's shape."""

    x0: jax.Array
    eps: jax.Array


def like(coefficient, x):
    """One coefficient for each image, (B,) or a scalar, shaped so that it multiplies the images `x`."""
    if coefficient.ndim == 0:
        return coefficient
    return jnp.expand_dims(coefficient, tuple(range(coefficient.ndim, jnp.ndim(x))))


def q_sample(schedule, x0, t, eps):
    """Noise clean images: x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε.                                    DDPM Eq. 4

    x0, eps: (B, ...); t: (B,) or scalar. Returns x_t (B, ...).
    """
    return like(schedule.signal(t), x0) * x0 + like(schedule.noise(t), x0) * eps


def target(schedule, kind, x0, t, eps):
    """What a network of this `kind` is to output at x_t = q_sample(schedule, x0, t, eps).

        'eps'   ε                                      DDPM §3.2
        'x0'    x_0
        'v'     √ᾱ_t·ε − √(1−ᾱ_t)·x_0                  progressive distillation (arXiv:2202.00512) §4

    x0, eps: (B, ...); t: (B,) or scalar. Returns (B, ...). Raises ValueError for another kind.
    """
    if kind == 'eps':
        return eps
    if kind == 'x0':
        return x0
    if kind == 'v':
        return like(schedule.signal(t), x0) * eps - like(schedule.noise(t), x0) * x0
    raise _unknown(kind)


def predict(schedule, kind, output, x_t, t, *, clip=False) -> Prediction:
    """The image and the noise that a network's output stands for; the inverse of `target`.

        'eps'   x̂_0 = (x_t − √(1−ᾱ_t)·ε̂)/√ᾱ_t         DDPM Eq. 15, DDIM Eq. 9
        'x0'    ε̂ = (x_t − √ᾱ_t·x̂_0)/√(1−ᾱ_t)
        'v'     x̂_0 = √ᾱ_t·x_t − √(1−ᾱ_t)·v̂,   ε̂ = √(1−ᾱ_t)·x_t + √ᾱ_t·v̂

    With `clip`, x̂_0 is clipped to [−1, 1], and ε̂ is derived again so that the two still make x_t; with
    clip='x0-only' ε̂ stays what it was, and they do not (diffusers' DDIM).

    output, x_t: (B, ...); t: (B,) or scalar, t ≥ 1; clip: False, True or 'x0-only'.
    Raises ValueError for another kind or clip, and for 'eps' at a level where ᾱ_t = 0: x_t then holds
    nothing of x_0 (x̂_0 is NaN where `t` is traced).
    """
    if clip not in (False, True, 'x0-only'):
        raise ValueError(f"clip is {clip!r}, but must be False, True or 'x0-only'")
    signal, noise = like(schedule.signal(t), x_t), like(schedule.noise(t), x_t)
    if kind == 'eps':
        require_signal(schedule, kind, t)
        x0 = jnp.where(signal > 0, (x_t - noise * output) / signal, jnp.nan)
        prediction = Prediction(x0, output)
    elif kind == 'x0':
        prediction = Prediction(output, (x_t - signal * output) / noise)
    elif kind == 'v':
        prediction = Prediction(signal * x_t - noise * output, noise * x_t + signal * output)
    else:
        raise _unknown(kind)
    if clip:
        x0 = jnp.clip(prediction.x0, -1, 1)
        prediction = Prediction(x0, prediction.eps if clip == 'x0-only' else (x_t - signal * x0) / noise)
    return prediction


def require_signal(schedule, kind, t):
    """Raise ValueError if x̂_0 cannot be had from a network of this `kind` at level `t`; traced levels pass."""
    with jax.ensure_compile_time_eval():  # so that concrete levels stay concrete under jit
        signal = schedule.signal(t)
    if kind == 'eps' and not isinstance(signal, jax.core.Tracer) and not np.all(np.asarray(signal) > 0):
        raise ValueError(
            "x_0 cannot be derived from eps at a level where alpha_bar is 0 (level T of the 'jsd' schedule); "
            "use kind 'x0' or 'v', or timesteps that start below that level"
        )


def posterior(schedule, prediction, s, t, *, eta):
    """The kernel: mean and standard deviation of q_σ(x_s | x_t, x_0), for any 0 ≤ s < t.

        mean = √ᾱ_s·x0 + √(1−ᾱ_s−σ²)·eps                                               DDIM Eq. 7, 12
        σ    = η · √((1−ᾱ_s)/(1−ᾱ_t)) · √(1−ᾱ_t/ᾱ_s)                                   DDIM Eq. 16

    η = 1 is the posterior of DDPM (Eq. 7), η = 0 the deterministic step of DDIM. With the true pair
    (x_0, ε) this is the forward process; with a predicted pair (x̂_0, ε̂) it is the model.
    At s = 0 it is x0 itself: mean x0, std 0.

    prediction: Prediction of (B, ...); s, t: (B,) or scalar; eta: Python float in [0, 1].
    Returns (mean (B, ...), std), std a shape that broadcasts against mean.
    Raises ValueError where eta is outside [0, 1], and for levels that are not s < t (traced levels pass).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f'eta is {eta}, but must lie in [0, 1]: 0 is DDIM, 1 is DDPM')
    if not any(isinstance(level, jax.core.Tracer) for level in (s, t)) and np.any(np.asarray(s) >= np.asarray(t)):
        raise ValueError(f'the kernel goes from level t to a lower one, but s is {s} and t is {t}')
    x0, eps = prediction
    beta = schedule.beta(s, t)
    ratio = (schedule.noise(s) / schedule.noise(t)) ** 2
    std = eta * jnp.sqrt(ratio * beta)
    # 1−ᾱ_s−σ² = (1−ᾱ_s)·(1 − η²·β/(1−ᾱ_t)), and 1 − β/(1−ᾱ_t) = (1−β)·(1−ᾱ_s)/(1−ᾱ_t): a sum without cancellation.
    direction = schedule.noise(s) * jnp.sqrt((1 - eta**2) + eta**2 * (1 - beta) * ratio)
    mean = like(schedule.signal(s), x0) * x0 + like(direction, x0) * eps
    return mean, like(std, x0)


def own_variance(schedule, variance, s, t, *, eta):
    """The variances that a reverse chain has in place of the kernel's σ², one for each pair (t, s).

        'small'              None: the kernel's own, DDPM's β̃ at η = 1
        'large'              1 − ᾱ_t/ᾱ_s: DDPM's σ² = β, the DDIM paper's σ̂²
        array (num_steps,)   these, first pair first, the decoder's (s = 0) last

    s, t: (num_steps,). Returns None or (num_steps,) float32. Raises ValueError for another variance, for one
    that is negative or not finite, and for 'large' with eta = 0, which has no noise.
    """
    if not isinstance(variance, str):
        if not isinstance(variance, jax.core.Tracer):
            variance = np.asarray(variance, np.float32)
            if not np.all((variance >= 0) & np.isfinite(variance)):
                raise ValueError(f'a variance is finite and not negative; not {variance}')
        if variance.shape != t.shape:
            raise ValueError(f'variance has the shape {variance.shape}, but the chain has {len(t)} steps')
        return jnp.asarray(variance)
    if variance == 'small':
        return None
    if variance != 'large':
        raise ValueError(f"variance is {variance!r}, but must be 'small', 'large' or an array")
    if eta == 0:
        raise ValueError("variance 'large' adds noise, and eta=0 (DDIM) has none; use eta=1 or variance 'small'")
    return schedule.beta(s, t)


def chain(schedule, kind, timesteps):
    """The pairs of a chain, as arrays (t, s), from its levels (num_steps+1,), first > … > last = 0.

    Raises ValueError where the levels do not decrease to 0 or leave the schedule, and for kind 'eps'
    from a level where ᾱ is 0.
    """
    levels = np.asarray(timesteps)
    if levels.ndim != 1 or len(levels) < 2 or levels[-1] != 0 or np.any(np.diff(levels) >= 0):
        raise ValueError(f'timesteps must decrease to 0 through at least one level, not {levels}')
    require_signal(schedule, kind, levels[0])
    return levels[:-1], levels[1:]


def _unknown(kind):
    return ValueError(f'kind is {kind!r}, but must be one of {", ".join(KINDS)}')
