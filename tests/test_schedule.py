"""The schedule against arithmetic of 40 digits, and the spacings against the codebases they are named after."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion import schedule
from tests import oracles

NAMES = sorted(schedule.SCHEDULES)


@functools.cache
def exact_alpha_bars(name, T):
    """ᾱ_0 … ᾱ_T to 40 digits."""
    return oracles.alpha_bars(oracles.betas(name, T))


@pytest.mark.parametrize('T', [1000, 4000, 10_000])
@pytest.mark.parametrize('name', NAMES)
def test_table_is_exact(name, T):
    sch = schedule.SCHEDULES[name](T)
    exact = exact_alpha_bars(name, T)
    assert sch.T == T
    t = np.arange(T + 1)
    one_minus = np.array([float(1 - a) for a in exact])
    noise2 = np.asarray(sch.noise(t), np.float64) ** 2
    np.testing.assert_allclose(noise2[1:], one_minus[1:], rtol=1e-6)
    np.testing.assert_allclose(-np.expm1(np.asarray(sch.log_alpha_bar, np.float64)), one_minus, rtol=1e-6)
    alive = np.array([float(a) > 1e-30 for a in exact])
    alpha_bar = np.array([float(a) for a in exact])
    # The relative error of ᾱ is the absolute error of log ᾱ, itself rounded to float32.
    tolerance = 3e-7 * np.maximum(1, -np.log(alpha_bar[alive]))
    assert np.all(np.abs(np.asarray(sch.alpha_bar(t), np.float64)[alive] / alpha_bar[alive] - 1) < tolerance)
    assert sch.alpha_bar(0) == 1 and sch.noise(0) == 0 and sch.signal(0) == 1


@pytest.mark.parametrize('name', NAMES)
def test_derived_quantities(name):
    sch = schedule.SCHEDULES[name](1000)
    exact = [float(a) for a in oracles.alpha_bars(oracles.betas(name, 1000))]
    t = np.arange(1, 1000)
    a = np.array(exact)[t]
    np.testing.assert_allclose(sch.signal(t), np.sqrt(a), rtol=2e-5)
    np.testing.assert_allclose(sch.snr(t), a / (1 - a), rtol=4e-5)
    np.testing.assert_allclose(sch.log_snr(t), np.log(a) - np.log1p(-a), rtol=1e-6, atol=4e-6)
    assert sch.snr(0) == np.inf and sch.log_snr(0) == np.inf


@pytest.mark.parametrize('T', [1000, 4000, 10_000])
@pytest.mark.parametrize('name', NAMES)
def test_every_variance_has_all_digits_of_float32(name, T):
    """β(s, t) from every s to the next level, to a tenth of the chain and to its end: differences of the tables."""
    sch, exact, s = schedule.SCHEDULES[name](T), exact_alpha_bars(name, T), np.arange(T)
    for t in (s + 1, np.minimum(s + T // 10, T), np.full(T, T)):
        expected = [float(1 - exact[j] / exact[i]) for i, j in zip(s, t, strict=True)]
        np.testing.assert_allclose(sch.beta(s, t), expected, rtol=4e-7)


@pytest.mark.parametrize('name', NAMES)
def test_the_betas_come_back(name):
    """As an export lists them: with more digits than float32 has."""
    expected = [float(beta) for beta in oracles.betas(name, 10_000)]
    np.testing.assert_allclose(schedule.SCHEDULES[name](10_000).betas(), expected, rtol=1e-8)


@pytest.mark.parametrize('name', NAMES)
def test_zero_terminal_snr(name):
    """√ᾱ becomes an affine function of what it was, ends at 0, and starts as before; a second time changes nothing."""
    before = schedule.SCHEDULES[name](1000)
    after = schedule.with_zero_terminal_snr(before)
    t = np.arange(1, 1001)
    x, y = (np.asarray(sch.signal(t), np.float64) for sch in (before, after))
    assert y[-1] == 0 and after.log_alpha_bar[-1] == -np.inf and before.beta(0, 1) == after.beta(0, 1)
    slope, start = np.polyfit(x, y, 1)
    np.testing.assert_allclose(y, slope * x + start, atol=1e-6)
    np.testing.assert_allclose(schedule.with_zero_terminal_snr(after).betas(), after.betas(), rtol=1e-9)
    with pytest.raises(ValueError, match='at least 2 levels'):
        schedule.with_zero_terminal_snr(schedule.linear(1))


@pytest.mark.parametrize('name', NAMES)
def test_variances_between_real_levels_have_all_digits(name):
    """Within one interval ᾱ_t/ᾱ_s is a power of 1 − β: halves and quarters of all intervals of 10,000 levels."""
    s = np.arange(10_000 - (name == 'jsd'))
    beta = np.array([float(b) for b in oracles.betas(name, 10_000)])[s]
    sch = schedule.SCHEDULES[name](10_000)
    for lower, upper in ((0.0, 0.5), (0.5, 1.0), (0.25, 0.75)):
        expected = -np.expm1((upper - lower) * np.log1p(-beta))
        found = sch.beta((s + lower).astype(np.float32), (s + upper).astype(np.float32))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_the_derivative_at_whole_levels_is_that_of_the_next_interval(name):
    """d log ᾱ/dt = log(1 − β_{t+1}), at the end log(1 − β_T); the other quantities by the chain rule in float64."""
    T = 50
    sch = schedule.SCHEDULES[name](T)
    quantities = (sch.log_alpha_bar_at, sch.alpha_bar, sch.signal, sch.noise, sch.log_snr, sch.snr)
    derivative = jax.jit(jax.vmap(jax.jacfwd(lambda t: jnp.stack([quantity(t) for quantity in quantities]))))
    found = np.asarray(derivative(jnp.arange(T + 1.0)))
    assert np.isfinite(found).all()
    end = T - (name == 'jsd')  # the last level with ᾱ > 0
    a = np.array([float(a) for a in oracles.alpha_bars(oracles.betas(name, T))])[: end + 1]
    beta = np.array([float(b) for b in oracles.betas(name, T)])
    slope = np.log1p(-np.append(beta[:end], beta[end - 1]))
    np.testing.assert_allclose(found[: end + 1, :3].T, [slope, a * slope, 0.5 * np.sqrt(a) * slope], rtol=1e-5)
    a, slope = a[1:], slope[1:]
    expected = [-0.5 * a * slope / np.sqrt(1 - a), slope / (1 - a), a * slope / (1 - a) ** 2]
    np.testing.assert_allclose(found[1 : end + 1, 3:].T, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found[end + 1 :], 0)  # ᾱ is constant there


def test_jsd_ends_at_exactly_no_signal():
    sch = schedule.jsd(1000)
    assert sch.alpha_bar(1000) == 0 and sch.signal(1000) == 0 and sch.noise(1000) == 1 and sch.snr(1000) == 0
    assert sch.beta(999, 1000) == 1
    assert sch.log_snr(1000) == -np.inf
    np.testing.assert_allclose(sch.alpha_bar(np.arange(1001)), 1 - np.arange(1001) / 1000, atol=1e-7)
    assert sch.alpha_bar(1000.0) == 0 and sch.alpha_bar(999.0) == sch.alpha_bar(999)
    assert sch.alpha_bar(999.5) == 0


@given(st.floats(0, 50), st.sampled_from(NAMES))
def test_between_levels_log_alpha_bar_is_linear(t, name):
    sch = schedule.SCHEDULES[name](50)
    table = np.asarray(sch.log_alpha_bar, np.float64)
    lower, upper = table[int(np.floor(t))], table[int(np.ceil(t))]
    fraction = np.float32(t) - np.floor(np.float32(t))
    expected = lower if fraction == 0 else (1 - fraction) * lower + fraction * upper
    np.testing.assert_allclose(sch.log_alpha_bar_at(jnp.float32(t)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('t', [-1, 11, -0.5, 10.5, np.nan])
def test_levels_outside_are_never_clamped(t):
    sch = schedule.linear(10)
    with pytest.raises(ValueError, match='levels lie in'):
        sch.signal(t)
    assert np.isnan(jax.jit(sch.signal)(t))


def test_any_shape_of_t_and_pytree():
    sch = schedule.cosine(10)
    assert sch.noise(np.zeros((2, 3), int)).shape == (2, 3)
    same = jax.jit(lambda s, t: s.noise(t))(sch, 4)
    assert same == sch.noise(4)
    assert jax.tree.leaves(sch)[0].dtype == jnp.float32


@pytest.mark.parametrize('bad', [[], [[0.1]], [0.1, 0.0], [0.1, -0.1], [1.0, 0.1], [0.1, np.nan], [0.1, 1.1]])
def test_invalid_betas_are_an_error(bad):
    with pytest.raises(ValueError):
        schedule.from_betas(bad)


@pytest.mark.parametrize('name', NAMES)
def test_a_chain_that_does_not_start_at_noise_is_told(name):
    """√ᾱ above 0.1, by the product of the β in float64: at the last level of few levels, and far below the last one."""
    for T in (10, 100, 1000):
        signal = float(exact_alpha_bars(name, T)[T]) ** 0.5
        warning = schedule.start_warning(schedule.SCHEDULES[name](T), T)
        assert bool(warning) == (signal > 0.1)
        assert not warning or f'√ᾱ_t is {signal:.2f} at t={T} of T={T}' in warning
    assert '√ᾱ_t is 0.60 at t=100' in schedule.start_warning(schedule.linear(100), 100)
    assert '√ᾱ_t is 0.16 at t=600 of T=1000' in schedule.start_warning(schedule.linear(1000), 600)


# The levels of a chain.


def ddim_code(T, S, spacing):
    """The sequence of the DDIM code's runners/diffusion.py, of whatever length; levels there start at 0."""
    if spacing == 'uniform':
        return list(range(0, T, T // S))
    return [int(s) for s in list(np.linspace(0, np.sqrt(T * 0.8), S) ** 2)]


def diffusers_code(T, S, spacing):
    """DDIMScheduler.set_timesteps of diffusers; levels there start at 0."""
    if spacing == 'linspace':
        return np.linspace(0, T - 1, S).round()[::-1].astype(np.int64)
    if spacing == 'leading':
        return (np.arange(0, S) * (T // S)).round()[::-1].astype(np.int64)
    return np.round(np.arange(T, 0, -T / S)).astype(np.int64) - 1


@pytest.mark.parametrize('spacing', ['uniform', 'quad'])
def test_equal_to_the_ddim_code_wherever_it_gives_the_requested_number(spacing):
    refused = 0
    for S in [*range(2, 130), *range(130, 1001, 29), 300, 600, 1000]:
        theirs = ddim_code(1000, S, spacing)
        if len(set(theirs)) == S:
            np.testing.assert_array_equal(schedule.timesteps(1000, S, spacing)[:-1], np.array(theirs)[::-1] + 1)
        else:
            refused += 1
            with pytest.raises(ValueError, match='steps'):
                schedule.timesteps(1000, S, spacing)
    assert refused


@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
@pytest.mark.parametrize('T', [1000, 50, 4000])
def test_equal_to_diffusers(spacing, T):
    for S in {2, 3, 7, 10, 20, 25, 33, 50, 100, 150, 250, 300, 600, 999, 1000, T} & set(range(T + 1)):
        theirs = diffusers_code(T, S, spacing)
        assert len(theirs) == S
        np.testing.assert_array_equal(schedule.timesteps(T, S, spacing)[:-1], theirs + 1)


@given(st.integers(1, 300), st.data(), st.sampled_from(sorted(schedule.SPACINGS)))
def test_exactly_the_requested_number_of_steps_or_an_error(T, data, spacing):
    S = data.draw(st.integers(1, T))
    try:
        levels = schedule.timesteps(T, S, spacing)
    except ValueError as error:
        assert spacing != 'trailing' and ('different steps' in str(error) or 'level 1' in str(error))
        return
    assert len(levels) == S + 1 and levels[-1] == 0 and np.all(np.diff(levels) < 0) and levels[0] <= T
    first = {'leading': 1 + (S - 1) * (T // S), 'uniform': 1 + (S - 1) * (T // S), 'quad': levels[0]}.get(spacing, T)
    assert levels[0] == first
    assert levels[-2] == {'trailing': np.round(T - (S - 1) * T / S)}.get(spacing, 1)


def test_known_traps():
    assert schedule.timesteps(1000, 10, 'uniform')[0] == 901
    for spacing, steps in [('uniform', 300), ('uniform', 600), ('quad', 100)]:
        with pytest.raises(ValueError, match=f'num_steps={steps}'):
            schedule.timesteps(1000, steps, spacing)
    np.testing.assert_array_equal(schedule.timesteps(1000, 1), [1000, 0])
    np.testing.assert_array_equal(schedule.timesteps(1000, 1000), np.arange(1000, -1, -1))


@pytest.mark.parametrize('steps', [0, -1, 11])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(ValueError, match='1 to 10'):
        schedule.timesteps(10, steps)


def test_an_unknown_spacing_is_an_error_that_lists_the_table():
    with pytest.raises(ValueError, match="spacing is 'trialing', but must be one of trailing, leading, linspace"):
        schedule.timesteps(10, 5, 'trialing')


def test_a_spacing_added_to_the_table(monkeypatch):
    monkeypatch.setitem(schedule.SPACINGS, 'squares', lambda T, S: T - np.arange(S) ** 2)
    np.testing.assert_array_equal(schedule.timesteps(100, 4, 'squares'), [100, 99, 96, 91, 0])
