"""The noise schedule: ᾱ_t for t = 0 … T, and the noise levels that a chain visits.

Level 0 is clean data (ᾱ_0 = 1); level T is (almost) pure noise. There is no level −1.

    x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε,      ᾱ_t = ∏_{i≤t} (1−β_i)          DDPM Eq. 4
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float64, Int, Real

Levels = Real[ArrayLike, '*batch']  # noise levels, integer or real, 0 ≤ t ≤ T
Values = Float[Array, '*batch']  # one value for each level


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """A variance-preserving noise schedule, stored as tables of log ᾱ_t.

    Between two levels log ᾱ is linear, so the schedule is also an SDE whose β is piecewise constant. If ᾱ_T = 0, ᾱ is 0
    throughout the last interval except at its lower end.

    Every method accepts integer or real levels t of any shape, 0 ≤ t ≤ T, and returns float32 of the same shape.
    A level outside [0, T] raises ValueError; if `t` is traced by JAX, the result is NaN. Levels are never clamped.

    The derivative with respect to a real level is that of the piecewise linear table. At a whole level, it is that of
    the interval above; at the last level with ᾱ > 0, that of the interval below. It is 0 beyond that level, and at
    level 0 for noise, snr and log_snr, whose derivative is infinite there.

    Attributes:
        log_alpha_bar: (T+1,) float32; the first entry is 0; the last one is −inf if β_T = 1.
        remainder: (T+1,) float32, log ᾱ_t minus its float32 value, which keeps differences of close levels exact.
    """

    log_alpha_bar: Float[Array, 'T+1']
    remainder: Float[Array, 'T+1']

    @property
    def T(self) -> int:
        """The number of noise levels, not counting level 0 (clean data)."""
        return self.log_alpha_bar.shape[0] - 1

    def log_alpha_bar_at(self, t: Levels) -> Values:
        """log ᾱ_t, linear between two levels."""
        return self._at(t)[0]

    def _at(self, t: Levels) -> tuple[Values, Values]:
        """log ᾱ_t, and what rounding took from it."""
        if not isinstance(t, jax.core.Tracer):
            t = np.asarray(t)
            if not np.all((t >= 0) & (t <= self.T)):
                raise ValueError(f'noise levels lie in [0, {self.T}], but t goes from {t.min()} to {t.max()}')
        t = jnp.asarray(t)
        if jnp.issubdtype(t.dtype, jnp.integer):
            return self._gather(t)
        last = self.T - jnp.isinf(self.log_alpha_bar[-1]).astype(jnp.int32)  # the last level with ᾱ > 0
        floor = jnp.floor(t).astype(jnp.int32)
        below = jnp.where((t == last) | (t == self.T), jnp.maximum(floor - 1, 0), floor)
        fraction = (t - below).astype(jnp.float32)
        (lower, lower_rest), (upper, upper_rest) = self._gather(below), self._gather(below + 1)
        ends_at_noise = upper == -jnp.inf
        rise = jnp.where(ends_at_noise, 0, (upper - lower) + (upper_rest - lower_rest))
        # From the nearer end, so that whole levels have exactly the values of the table.
        near = jnp.where(ends_at_noise, fraction == 0, fraction < 0.5)
        start, rest = jnp.where(near, lower, upper), jnp.where(near, lower_rest, upper_rest)
        change = jnp.where(near, fraction, fraction - 1) * rise
        value = start + change
        finite_start, finite_value = (jnp.where(jnp.isinf(value), 0, number) for number in (start, value))
        return value, rest + ((finite_start - finite_value) + change)

    def _gather(self, index: Int[Array, '*batch']) -> tuple[Values, Values]:
        def get(table):
            return table.at[index].get(mode='fill', fill_value=jnp.nan, wrap_negative_indices=False)

        with jax.debug_nans(False):  # the constant NaN is no result
            return get(self.log_alpha_bar), get(self.remainder)

    def _where_noisy(self, t: Levels, function: Callable[[Values], Values], at_0: float) -> Values:
        """`function` of log ᾱ_t, but `at_0` where ᾱ_t = 1, with derivative 0 there instead of NaN."""
        log_alpha_bar = self.log_alpha_bar_at(t)
        clean = log_alpha_bar == 0
        return jnp.where(clean, at_0, function(jnp.where(clean, -1, log_alpha_bar)))

    def alpha_bar(self, t: Levels) -> Values:
        """ᾱ_t, in [0, 1]."""
        return jnp.exp(self.log_alpha_bar_at(t))

    def signal(self, t: Levels) -> Values:
        """√ᾱ_t, the coefficient of x_0 in x_t."""
        return jnp.exp(0.5 * self.log_alpha_bar_at(t))

    def noise(self, t: Levels) -> Values:
        """√(1−ᾱ_t), the coefficient of ε in x_t."""
        return self._where_noisy(t, lambda log_alpha_bar: jnp.sqrt(-jnp.expm1(log_alpha_bar)), 0)

    def snr(self, t: Levels) -> Values:
        """SNR(t) = ᾱ_t/(1−ᾱ_t); +inf at level 0."""
        return self._where_noisy(t, lambda log_alpha_bar: jnp.exp(_log_snr(log_alpha_bar)), jnp.inf)

    def log_snr(self, t: Levels) -> Values:
        """log SNR(t) = log ᾱ_t − log(1−ᾱ_t); +inf at level 0, −inf where ᾱ_t = 0."""
        return self._where_noisy(t, _log_snr, jnp.inf)

    def log_ratio(self, s: Levels, t: Levels) -> Values:
        """log ᾱ_t/ᾱ_s for any s < t, with all digits of float32 however close s and t are."""
        (value_s, rest_s), (value_t, rest_t) = self._at(s), self._at(t)
        return (value_t - value_s) + (rest_t - rest_s)

    def beta(self, s: Levels, t: Levels) -> Values:
        """1 − ᾱ_t/ᾱ_s, the variance of q(x_t | x_s) for any s < t; this is β_t if s = t−1."""
        return -jnp.expm1(self.log_ratio(s, t))

    def betas(self) -> Float64[np.ndarray, 'T']:
        """β_1 … β_T in float64, the inverse of `from_betas`."""
        log_alpha_bar = np.asarray(self.log_alpha_bar, np.float64) + np.asarray(self.remainder, np.float64)
        return -np.expm1(np.diff(log_alpha_bar))


def _log_snr(log_alpha_bar: Values) -> Values:
    return log_alpha_bar - jnp.log(-jnp.expm1(log_alpha_bar))


def from_betas(betas: Float[np.ndarray, 'T'] | Sequence[float]) -> Schedule:
    """Build the schedule with ᾱ_t = ∏_{i≤t} (1−β_i), computed in float64 and stored as two float32 tables.

    Args:
        betas: (T,), β_1 … β_T, each in (0, 1). Only β_T may be 1; then ᾱ_T = 0.

    Returns:
        The schedule of T levels.

    Raises:
        ValueError: `betas` has another shape or a value outside this range.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f'betas must have shape (T,) with T ≥ 1, not {betas.shape}')
    allowed = (betas > 0) & (betas < 1)
    allowed[-1] |= betas[-1] == 1
    if not allowed.all():
        t = int(np.argmin(allowed)) + 1
        raise ValueError(f'β_{t} is {betas[t - 1]}, not in (0, 1); only the last β may be 1')
    with np.errstate(divide='ignore'):  # log(1−β_T) = −inf is correct for β_T = 1
        log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])
    rounded = log_alpha_bar.astype(np.float32)
    remainder = np.subtract(log_alpha_bar, rounded, where=np.isfinite(rounded), out=np.zeros(len(rounded)))
    return Schedule(jnp.asarray(rounded), jnp.asarray(remainder, jnp.float32))


def with_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shift and scale √ᾱ so that ᾱ_T = 0 while ᾱ_1 stays (Lin et al. 2023, arXiv:2305.08891, Algorithm 1).

        √ᾱ_t → (√ᾱ_t − √ᾱ_T)·√ᾱ_1/(√ᾱ_1 − √ᾱ_T)

    As x_T then contains nothing of x_0, a network must predict x_0 or v, not ε.

    Args:
        schedule: of at least 2 levels; one with ᾱ_T = 0 stays as it is.

    Raises:
        ValueError: it has only one level.
    """
    if schedule.T < 2:
        raise ValueError('T is 1, but a schedule whose ᾱ_T becomes 0 while ᾱ_1 stays needs at least 2 levels')
    betas = schedule.betas()
    with np.errstate(divide='ignore'):
        signal = np.exp(np.cumsum(np.log1p(-betas)) / 2)
    signal -= signal[-1]  # the factor cancels in the ratios
    return from_betas([betas[0], *(1 - (signal[1:] / signal[:-1]) ** 2)])


def linear(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β_t rises from beta_start to beta_end in equal steps (DDPM §4).

    Args:
        T: the number of noise levels, at least 1.
        beta_start: β_1, in (0, 1).
        beta_end: β_T, in (0, 1].

    Raises:
        ValueError: a β_t is outside (0, 1), see `from_betas`.
    """
    return from_betas(np.linspace(beta_start, beta_end, T))


def quadratic(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """√β_t rises from √beta_start to √beta_end in equal steps ('quad' in the DDIM code).

    Args:
        T: the number of noise levels, at least 1.
        beta_start: β_1, in (0, 1).
        beta_end: β_T, in (0, 1].

    Raises:
        ValueError: a β_t is outside (0, 1), see `from_betas`.
    """
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2)


def constant(T: int, beta_end: float = 0.02) -> Schedule:
    """β_t = beta_end for every t ('const' in the DDIM code).

    Args:
        T: the number of noise levels, at least 1.
        beta_end: β_1 = … = β_T, in (0, 1).

    Raises:
        ValueError: a β_t is outside (0, 1), see `from_betas`.
    """
    return from_betas(np.full(T, beta_end))


def jsd(T: int) -> Schedule:
    """β_t = 1/(T−t+1), so that ᾱ_t = 1 − t/T (Sohl-Dickstein et al. 2015, arXiv:1503.03585).

    The chain ends at ᾱ_T = 0. There x_T contains nothing of x_0, so a network must predict x_0 or v, not ε.

    Args:
        T: the number of noise levels, at least 1.

    Raises:
        ValueError: T is less than 1.
    """
    return from_betas(1 / np.arange(T, 0, -1))


def sigmoid(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β_t = beta_start + (beta_end − beta_start)/(1 + e^{−u}), u from −6 to 6 in equal steps (DDIM code).

    Args:
        T: the number of noise levels, at least 1.
        beta_start: the limit of β for u → −∞, in (0, 1).
        beta_end: the limit of β for u → ∞, in (0, 1).

    Raises:
        ValueError: a β_t is outside (0, 1), see `from_betas`.
    """
    return from_betas(beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, T))))


def cosine(T: int, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """ᾱ_t = f(t)/f(0) with f(t) = cos²(π/2·(t/T + offset)/(1 + offset)), but β_t ≤ max_beta.

    Improved DDPM (arXiv:2102.09672) Eq. 17.

    Args:
        T: the number of noise levels, at least 1.
        offset: the paper's s, at least 0; it keeps β_1 from being too small.
        max_beta: the upper bound of β_t, in (0, 1).

    Raises:
        ValueError: a β_t is outside (0, 1), see `from_betas`.
    """
    f = np.cos(np.pi / 2 * (np.arange(T + 1) / T + offset) / (1 + offset)) ** 2
    return from_betas(np.minimum(1 - f[1:] / f[:-1], max_beta))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    'linear': linear,
    'quadratic': quadratic,
    'constant': constant,
    'jsd': jsd,
    'sigmoid': sigmoid,
    'cosine': cosine,
}


def start_warning(schedule: Schedule, t: int) -> str:
    """Say why a chain should not start from pure noise at level t, where √ᾱ_t is above 0.1; '' if it may."""
    signal = float(schedule.signal(t))
    if signal <= 0.1:
        return ''
    return (
        f'√ᾱ_t is {signal:.2f} at t={t} of T={schedule.T}: x_t still shows x_0 there, but sampling starts from pure '
        'noise, so that the images will not match the data'
    )


# A spacing maps (T, num_steps) to the levels above 0 that a chain visits, the noisiest first.
# diffusers and the DDIM code count levels from 0, this project counts from 1: hence `1 +`.


def _trailing(T: int, num_steps: int) -> np.ndarray:
    return np.round(np.arange(T, 0, -T / num_steps)[:num_steps])


def _leading(T: int, num_steps: int) -> np.ndarray:
    return 1 + (T // num_steps) * np.arange(num_steps)[::-1]


def _linspace(T: int, num_steps: int) -> np.ndarray:
    return 1 + np.round(np.linspace(0, T - 1, num_steps))[::-1]


def _uniform(T: int, num_steps: int) -> np.ndarray:
    return 1 + np.arange(0, T, T // num_steps)[::-1]


def _quad(T: int, num_steps: int) -> np.ndarray:
    return 1 + np.floor(np.linspace(0, np.sqrt(0.8 * T), num_steps) ** 2)[::-1]


SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    'trailing': _trailing,
    'leading': _leading,
    'linspace': _linspace,
    'uniform': _uniform,
    'quad': _quad,
}


def timesteps(
    T: int, num_steps: int, spacing: str = 'trailing', *, exact: bool = True
) -> Int[np.ndarray, 'num_steps+1']:
    """Choose the noise levels that a chain of `num_steps` steps visits, first > … > last = 0.

    The steps of the chain are the pairs (t, s) = (levels[i], levels[i+1]). With S = num_steps:

        spacing      first level        last level above 0   all levels above 0
        'trailing'   T                  round(T/S)           diffusers: round(T − i·T/S)
        'linspace'   T                  1                    diffusers: from 1 to T in S equal steps, rounded
        'leading'    1 + (S−1)·⌊T/S⌋    1                    diffusers: 1 + i·⌊T/S⌋
        'uniform'    1 + (S−1)·⌊T/S⌋    1                    DDIM code: 1 + every ⌊T/S⌋-th of 0 … T−1
        'quad'       1 + ⌊0.8·T⌋        1                    DDIM code: 1 + ⌊u²⌋, u from 0 to √(0.8·T) in S equal steps

    Args:
        T: the number of noise levels of the schedule.
        num_steps: the number of steps, from 1 to T.
        spacing: a key of `SPACINGS`.
        exact: if False, accept the number of distinct levels that the spacing gives, even if it is not `num_steps`.

    Returns:
        (num_steps+1,) int64, strictly decreasing, the last one 0.

    Raises:
        ValueError: the spacing is unknown; `num_steps` is out of range; with `exact`, the spacing does not give
            `num_steps` distinct levels (the DDIM code then silently runs another number of steps); or the chain
            would start at level 1, which is not noise.
    """
    if spacing not in SPACINGS:
        raise ValueError(f'spacing is {spacing!r}, but must be one of {", ".join(SPACINGS)}')
    if not 1 <= num_steps <= T:
        raise ValueError(f'num_steps is {num_steps}, but a schedule of T={T} levels allows 1 to {T}')
    levels = _levels(T, num_steps, spacing)
    if not exact:
        levels = np.unique(levels)[::-1]
    elif not _is_exact(T, num_steps, spacing):
        by_distance = sorted(range(1, T + 1), key=lambda n: abs(n - num_steps))
        near = itertools.islice((n for n in by_distance if _is_exact(T, n, spacing)), 2)
        raise ValueError(
            f'spacing {spacing!r} gives {len(set(levels))} different steps of T={T} for num_steps={num_steps}; '
            f"it gives exactly {' or '.join(map(str, sorted(near)))}, and 'trailing' gives any number"
        )
    if levels[0] == 1 < T:
        raise ValueError(f"spacing {spacing!r} with one step would start at level 1, not at noise; use 'trailing'")
    return np.append(levels, 0)


def _levels(T: int, num_steps: int, spacing: str) -> np.ndarray:
    return SPACINGS[spacing](T, num_steps).astype(np.int64)


def _is_exact(T: int, num_steps: int, spacing: str) -> bool:
    levels = _levels(T, num_steps, spacing)
    return len(levels) == num_steps and bool(np.all(np.diff(levels) < 0))
