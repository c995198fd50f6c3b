"""The noise schedule: ᾱ_t for t = 0 … T, and the levels that a chain visits.

Level 0 is clean data (ᾱ_0 = 1), level T is (almost) pure noise. There is no level −1.

    x_t = √ᾱ_t · x_0 + √(1−ᾱ_t) · ε,      ᾱ_t = ∏_{i≤t} (1−β_i)          DDPM Eq. 4
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The table of log ᾱ_t, from which everything else is derived.

    Every method takes noise levels `t`, 0 ≤ t ≤ T, as an integer or real array of any shape and
    returns float32 of that shape. Between levels log ᾱ is linear: a variance-preserving SDE whose β is
    piecewise constant. A level outside [0, T] is a ValueError, or NaN where `t` is traced by JAX
    (it is never clamped to the nearest one).

    log_alpha_bar: (T+1,) float32; entry 0 is 0; the last one is −inf where β_T = 1.
    """

    log_alpha_bar: jax.Array

    @property
    def T(self) -> int:
        """The number of noise levels, level 0 (clean data) not counted."""
        return self.log_alpha_bar.shape[0] - 1

    def log_alpha_bar_at(self, t):
        """log ᾱ_t; linear between two levels."""
        if not isinstance(t, jax.core.Tracer):
            t = np.asarray(t)
            if not np.all((t >= 0) & (t <= self.T)):
                raise ValueError(f'noise levels lie in [0, {self.T}], but t goes from {t.min()} to {t.max()}')
        t = jnp.asarray(t)
        if jnp.issubdtype(t, jnp.integer):
            return self._gather(t)
        below = jnp.floor(t)
        fraction = t - below
        lower = self._gather(below.astype(jnp.int32))
        upper = self._gather(jnp.ceil(t).astype(jnp.int32))
        # Without the `where`, 0 · (−inf) would be NaN at level T of a schedule that ends at ᾱ = 0.
        return jnp.where(fraction == 0, lower, (1 - fraction) * lower + fraction * upper)

    def _gather(self, index):
        return self.log_alpha_bar.at[index].get(mode='fill', fill_value=jnp.nan, wrap_negative_indices=False)

    def alpha_bar(self, t):
        """ᾱ_t."""
        return jnp.exp(self.log_alpha_bar_at(t))

    def signal(self, t):
        """√ᾱ_t, what multiplies x_0 in x_t."""
        return jnp.exp(0.5 * self.log_alpha_bar_at(t))

    def noise(self, t):
        """√(1−ᾱ_t), what multiplies ε in x_t."""
        return jnp.sqrt(-jnp.expm1(self.log_alpha_bar_at(t)))

    def snr(self, t):
        """SNR(t) = ᾱ_t / (1−ᾱ_t); +inf at level 0."""
        return jnp.exp(self.log_snr(t))

    def log_snr(self, t):
        """log ᾱ_t − log(1−ᾱ_t); +inf at level 0, −inf where ᾱ_t = 0."""
        log_alpha_bar = self.log_alpha_bar_at(t)
        return log_alpha_bar - jnp.log(-jnp.expm1(log_alpha_bar))

    def beta(self, s, t):
        """1 − ᾱ_t/ᾱ_s, the variance of q(x_t | x_s), for any s < t; β_t itself for s = t−1."""
        return -jnp.expm1(self.log_alpha_bar_at(t) - self.log_alpha_bar_at(s))


def from_betas(betas) -> Schedule:
    """The schedule with ᾱ_t = ∏_{i≤t} (1−β_i), computed in float64 and rounded once.

    betas: (T,), β_1 … β_T, each in (0, 1); β_T alone may be 1 (then ᾱ_T = 0).
    Raises ValueError for anything else.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f'betas must have shape (T,) with T ≥ 1, not {betas.shape}')
    allowed = (betas > 0) & (betas < 1)
    allowed[-1] |= betas[-1] == 1
    if not allowed.all():
        t = int(np.argmin(allowed)) + 1
        raise ValueError(f'β_{t} is {betas[t - 1]}, not in (0, 1); only the last β may be 1')
    with np.errstate(divide='ignore'):  # log(1−β_T) = −inf is meant where β_T = 1
        log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])
    return Schedule(jnp.asarray(log_alpha_bar, jnp.float32))


# The five schedules of the DDIM paper's code take the same three arguments, so that one config serves all.


def linear(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β_t from beta_start to beta_end in equal steps (DDPM §4), for t = 1 … T; ValueError as in `from_betas`."""
    return from_betas(np.linspace(beta_start, beta_end, T))


def quadratic(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """√β_t from √beta_start to √beta_end in equal steps ('quad' in the DDIM code); ValueError as in `from_betas`."""
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2)


def constant(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β_t = beta_end ('const' in the DDIM code); beta_start plays no part. ValueError as in `from_betas`."""
    return from_betas(np.full(T, beta_end))


def jsd(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β_t = 1/(T−t+1), so that ᾱ_t = 1 − t/T (Sohl-Dickstein et al. 2015); the two β play no part.

    It ends at ᾱ_T = 0: there x_T holds nothing of x_0, and a network must predict x_0 or v, not ε. Raises ValueError
    for T < 1.
    """
    return from_betas(1 / np.arange(T, 0, -1, np.float64))


def sigmoid(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β_t = beta_start + (beta_end − beta_start)·σ(u), u from −6 to 6 in equal steps (DDIM code).

    Raises ValueError as `from_betas`.
    """
    return from_betas(beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, T))))


def cosine(T: int, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """ᾱ_t = f(t)/f(0), f(t) = cos²(π/2 · (t/T + offset)/(1 + offset)), each β_t at most max_beta.

    Improved DDPM (arXiv:2102.09672) Eq. 17. Raises ValueError as `from_betas`.
    """
    f = np.cos(np.pi / 2 * (np.arange(T + 1) / T + offset) / (1 + offset)) ** 2
    return from_betas(np.minimum(1 - f[1:] / f[:-1], max_beta))


SCHEDULES = {
    'linear': linear,
    'quadratic': quadratic,
    'constant': constant,
    'jsd': jsd,
    'sigmoid': sigmoid,
    'cosine': cosine,
}


def _trailing(T, num_steps):
    return np.round(np.arange(T, 0, -T / num_steps)[:num_steps])


def _leading(T, num_steps):
    return 1 + (T // num_steps) * np.arange(num_steps)[::-1]


def _linspace(T, num_steps):
    return 1 + np.round(np.linspace(0, T - 1, num_steps))[::-1]


def _uniform(T, num_steps):
    return 1 + np.arange(0, T, T // num_steps)[::-1]


def _quad(T, num_steps):
    return 1 + np.floor(np.linspace(0, np.sqrt(0.8 * T), num_steps) ** 2)[::-1]


SPACINGS = {'trailing': _trailing, 'leading': _leading, 'linspace': _linspace, 'uniform': _uniform, 'quad': _quad}


def timesteps(T: int, num_steps: int, spacing: str = 'trailing', *, exact: bool = True) -> np.ndarray:
    """The noise levels that a chain of `num_steps` steps visits, first > … > last = 0.

    The chain's steps are the pairs (t, s) = (levels[i], levels[i+1]); with num_steps = T all spacings
    but 'quad' are T, T−1, …, 0. For S = num_steps the levels above 0 are

        spacing      first level        lowest level   of
        'trailing'   T                  round(T/S)     diffusers: round(T − i·T/S)
        'linspace'   T                  1              diffusers: 1 … T in S even steps, rounded
        'leading'    1 + (S−1)·⌊T/S⌋    1              diffusers: 1 + i·⌊T/S⌋
        'uniform'    1 + (S−1)·⌊T/S⌋    1              DDIM code: 1 + every ⌊T/S⌋-th of 0 … T−1
        'quad'       1 + ⌊0.8·T⌋        1              DDIM code: 1 + ⌊u²⌋, u from 0 to √(0.8·T) in S even steps

    diffusers and the DDIM code count levels from 0 where this project counts from 1.

    Returns (num_steps+1,) int64; without `exact`, the different levels of whatever number of steps comes out.
    Raises ValueError where the spacing does not give exactly `num_steps` different steps (the DDIM
    code then silently runs another number) and `exact` is asked, or would start at level 1.
    """
    if spacing not in SPACINGS:
        raise ValueError(f'spacing is {spacing!r}, but must be one of {", ".join(SPACINGS)}')
    if not 1 <= num_steps <= T:
        raise ValueError(f'num_steps is {num_steps}, but a schedule of T={T} levels allows 1 to {T}')
    levels = _levels(T, num_steps, spacing)
    if not exact:
        levels = np.unique(levels)[::-1]
    elif len(levels) != num_steps or np.any(np.diff(levels) >= 0):
        possible = [n for n in range(1, T + 1) if _is_exact(T, n, spacing)]
        near = sorted(possible, key=lambda n: abs(n - num_steps))[:2]
        raise ValueError(
            f'spacing {spacing!r} gives {len(set(levels))} different steps of T={T} where num_steps={num_steps} '
            f"was asked; it gives exactly {' or '.join(map(str, sorted(near)))}, and 'trailing' gives any number"
        )
    if levels[0] == 1 < T:
        raise ValueError(f"spacing {spacing!r} with one step would start at level 1, not at noise; use 'trailing'")
    return np.append(levels, 0)


def _levels(T, num_steps, spacing):
    return SPACINGS[spacing](T, num_steps).astype(np.int64)


def _is_exact(T, num_steps, spacing):
    levels = _levels(T, num_steps, spacing)
    return len(levels) == num_steps and not np.any(np.diff(levels) >= 0)
