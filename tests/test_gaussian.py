"""Noising, conversions and the kernel, against the papers' formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion import gaussian, schedule
from diffusion.gaussian import Prediction
from tests import oracles

T = 200
SCHEDULES = {name: make(T) for name, make in schedule.SCHEDULES.items()}
EXACT = {name: np.array([float(a) for a in oracles.alpha_bars(oracles.betas(name, T))]) for name in SCHEDULES}
kinds = st.sampled_from(list(gaussian.KINDS))
names = st.sampled_from(sorted(SCHEDULES))
pairs = st.integers(1, T).flatmap(lambda t: st.tuples(st.just(t), st.integers(0, t - 1)))
etas = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@given(names, pairs, etas)
def test_point_mass_is_carried_exactly(name, pair, eta):
    """For a known x_0 the step turns q(x_t|x_0) = N(√ᾱ_t·x_0, 1−ᾱ_t) into q(x_s|x_0), in mean and variance."""
    t, s = pair
    a_s = EXACT[name][s]
    x0 = 0.7
    mean, std = gaussian.posterior(
        SCHEDULES[name], Prediction(jnp.array([x0, 0.0]), jnp.array([0.0, 1.0])), s, t, eta=eta
    )
    carried_mean, direction = np.asarray(mean, np.float64)
    variance = direction**2 + float(std) ** 2
    np.testing.assert_allclose(carried_mean, np.sqrt(a_s) * x0, rtol=1e-5)
    np.testing.assert_allclose(variance, 1 - a_s, rtol=1e-5, atol=1e-12)


@given(names, st.integers(1, T - 1), st.floats(-1, 1), st.floats(-3, 3))
def test_eta_1_is_the_posterior_of_ddpm(name, t, x0, eps):
    """DDPM Eq. 6 and 7: μ̃ = √ᾱ_{t−1}·β_t/(1−ᾱ_t)·x_0 + √α_t·(1−ᾱ_{t−1})/(1−ᾱ_t)·x_t;  β̃ = (1−ᾱ_{t−1})/(1−ᾱ_t)·β_t."""
    a = EXACT[name]
    beta = 1 - a[t] / a[t - 1]
    x_t = np.sqrt(a[t]) * x0 + np.sqrt(1 - a[t]) * eps
    expected = np.sqrt(a[t - 1]) * beta / (1 - a[t]) * x0 + np.sqrt(1 - beta) * (1 - a[t - 1]) / (1 - a[t]) * x_t
    mean, std = gaussian.posterior(SCHEDULES[name], Prediction(jnp.float32(x0), jnp.float32(eps)), t - 1, t, eta=1.0)
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(std, np.sqrt((1 - a[t - 1]) / (1 - a[t]) * beta), rtol=1e-4)


@given(names, pairs, st.floats(0, 1), st.floats(-1, 1), st.floats(-3, 3))
def test_interior_eta_is_ddim_eq_12_and_16(name, pair, eta, x0, eps):
    t, s = pair
    a_t, a_s = EXACT[name][[t, s]]
    sigma = eta * np.sqrt((1 - a_s) / (1 - a_t)) * np.sqrt(1 - a_t / a_s)
    expected = np.sqrt(a_s) * x0 + np.sqrt(max(1 - a_s - sigma**2, 0)) * eps
    mean, std = gaussian.posterior(SCHEDULES[name], Prediction(jnp.float32(x0), jnp.float32(eps)), s, t, eta=eta)
    np.testing.assert_allclose(std, sigma, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=2e-5)


def test_eta_scales_the_std_not_the_variance():
    """FIELD: at η = .25 others have .50 (variance scaled) or .51 (coefficients interpolated)."""
    stds = [gaussian.posterior(SCHEDULES['linear'], Prediction(0.3, 0.2), 50, 100, eta=eta)[1] for eta in (0.25, 1.0)]
    np.testing.assert_allclose(stds[0] / stds[1], 0.25, rtol=1e-6)


@pytest.mark.parametrize('eta', [0.0, 0.3, 1.0])
def test_at_level_0_it_is_exactly_x0(eta):
    mean, std = gaussian.posterior(SCHEDULES['linear'], Prediction(jnp.float32(0.37), jnp.float32(2.0)), 0, 1, eta=eta)
    assert mean == np.float32(0.37) and std == 0


@pytest.mark.parametrize('eta', [0.0, 0.3, 1.0])
@pytest.mark.parametrize(('name', 't', 's'), [('linear', 9, 5), ('cosine', 1, 0), ('jsd', 20, 7), ('jsd', 20, 0)])
def test_the_derivative_of_a_step_with_respect_to_the_schedule(name, t, s, eta):
    """Against differences of DDIM Eq. 12 and 16 in float64; ᾱ_0 is the number 1, and log ᾱ_t = −∞ has no derivative."""
    sch = schedule.SCHEDULES[name](20)

    def ours(sch):
        mean, std = gaussian.posterior(sch, Prediction(jnp.float32(0.3), jnp.float32(2.0)), s, t, eta=eta)
        return mean + 3 * std

    def exact(log_s, log_t):
        a_s, a_t = np.exp(log_s), np.exp(log_t)
        sigma = eta * np.sqrt((1 - a_s) / (1 - a_t)) * np.sqrt(1 - a_t / a_s)
        direction = np.sqrt((1 - a_s) * (1 - eta**2 * (1 - a_t / a_s) / (1 - a_t)))  # √(1−ᾱ_s−σ²)
        return np.sqrt(a_s) * 0.3 + direction * 2.0 + 3 * sigma

    derivative = np.asarray(jax.grad(ours)(sch).log_alpha_bar)
    assert np.isfinite(derivative).all()
    log_s, log_t = np.asarray(sch.log_alpha_bar, np.float64)[[s, t]]
    if s > 0:
        by_s = (exact(log_s + 1e-6, log_t) - exact(log_s - 1e-6, log_t)) / 2e-6
        by_t = (exact(log_s, log_t + 1e-6) - exact(log_s, log_t - 1e-6)) / 2e-6 if np.isfinite(log_t) else 0
        np.testing.assert_allclose(derivative[[s, t]], [by_s, by_t], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('eta', [-0.1, 1.1, float('nan')])
def test_eta_outside_the_family_is_an_error(eta):
    with pytest.raises(ValueError, match='eta'):
        gaussian.posterior(SCHEDULES['linear'], Prediction(0.0, 0.0), 0, 1, eta=eta)


@pytest.mark.parametrize(('s', 't'), [(5, 5), (6, 5), (np.array([0, 5]), np.array([1, 5]))])
def test_a_step_leads_to_a_lower_level(s, t):
    with pytest.raises(ValueError, match='to a lower one'):
        gaussian.posterior(SCHEDULES['linear'], Prediction(np.zeros(2), np.zeros(2)), s, t, eta=1.0)


@given(names, st.integers(1, T - 1), kinds, st.integers(0, 2**31))
def test_predict_inverts_target(name, t, kind, seed):
    sch = SCHEDULES[name]
    x0, eps = jax.random.normal(jax.random.key(seed), (2, 5))
    x_t = gaussian.q_sample(sch, x0, t, eps)
    output = gaussian.target(sch, kind, x0, t, eps)
    prediction = gaussian.predict(sch, kind, output, x_t, t)
    # Dividing by these magnifies the rounding errors of x_t and of the output.
    signal, noise = float(sch.signal(t)), float(sch.noise(t))
    np.testing.assert_allclose(prediction.x0, x0, atol=2e-6 / signal)
    np.testing.assert_allclose(prediction.eps, eps, atol=4e-6 / noise)
    for other in gaussian.KINDS:
        again = gaussian.target(sch, other, prediction.x0, t, prediction.eps)
        np.testing.assert_allclose(again, gaussian.target(sch, other, x0, t, eps), atol=4e-6 / (signal * noise))


@given(st.integers(1, T), kinds)
def test_clipping_keeps_the_pair_on_x_t(t, kind):
    sch = SCHEDULES['linear']
    x_t = jnp.linspace(-4, 4, 9)
    raw = gaussian.predict(sch, kind, jnp.sin(3 * x_t), x_t, t)
    clipped = gaussian.predict(sch, kind, jnp.sin(3 * x_t), x_t, t, clip=True)
    np.testing.assert_array_equal(clipped.x0, np.clip(raw.x0, -1, 1))
    np.testing.assert_allclose(gaussian.q_sample(sch, clipped.x0, t, clipped.eps), x_t, atol=2e-6)
    halfway = gaussian.predict(sch, kind, jnp.sin(3 * x_t), x_t, t, clip='x0-only')
    np.testing.assert_array_equal(halfway.x0, clipped.x0)
    np.testing.assert_array_equal(halfway.eps, raw.eps)
    with pytest.raises(ValueError, match="clip is 'x0', but must be False, True or 'x0-only'"):
        gaussian.predict(sch, kind, x_t, x_t, t, clip='x0')


def test_q_sample_moments_and_batched_levels():
    sch = SCHEDULES['linear']
    t = jnp.array([0, 20, T])
    x0 = jnp.full((3, 100, 100, 1), 0.5)
    eps = jax.random.normal(jax.random.key(0), x0.shape)
    x_t = np.asarray(gaussian.q_sample(sch, x0, t, eps), np.float64)
    np.testing.assert_array_equal(x_t[0], x0[0])
    for i in (1, 2):
        a = EXACT['linear'][int(t[i])]
        error = np.sqrt((1 - a) / 10_000)
        assert abs(x_t[i].mean() - np.sqrt(a) * 0.5) < 4 * error
        assert abs(x_t[i].var() / (1 - a) - 1) < 4 * np.sqrt(2 / 10_000)


def test_no_x0_from_eps_without_signal():
    sch = SCHEDULES['jsd']
    with pytest.raises(ValueError, match="'x0' or 'v'"):
        gaussian.predict(sch, 'eps', jnp.zeros(3), jnp.zeros(3), T)
    assert not np.any(np.isfinite(jax.jit(lambda t: gaussian.predict(sch, 'eps', jnp.ones(3), jnp.zeros(3), t).x0)(T)))
    x_t, x0 = jnp.array([0.3, -1.0]), jnp.array([0.1, 0.2])
    for kind in ('x0', 'v'):
        prediction = gaussian.predict(sch, kind, gaussian.target(sch, kind, x0, T, x_t), x_t, T)
        np.testing.assert_array_equal(prediction.x0, x0)
        np.testing.assert_array_equal(prediction.eps, x_t)
        mean, std = gaussian.posterior(sch, prediction, T - 1, T, eta=1.0)
        a = EXACT['jsd'][T - 1]
        np.testing.assert_allclose(mean, np.sqrt(a) * x0, rtol=1e-5)  # x_T contains nothing of x_{T−1}
        np.testing.assert_allclose(std, np.sqrt(1 - a), rtol=1e-5)


def test_an_unknown_kind_is_an_error_that_lists_the_table():
    for call in (
        lambda: gaussian.target(SCHEDULES['linear'], 'noise', 0.0, 1, 0.0),
        lambda: gaussian.predict(SCHEDULES['linear'], 'noise', 0.0, 0.0, 1),
    ):
        with pytest.raises(ValueError, match="kind is 'noise', but must be one of eps, x0, v"):
            call()


def test_a_kind_added_to_the_table(monkeypatch):
    """The score −ε/√(1−ᾱ_t), which does not determine x_0 where ᾱ is 0 either."""

    def predict(signal, noise, output, x_t):
        return Prediction((x_t + noise**2 * output) / signal, -noise * output)

    monkeypatch.setitem(gaussian.KINDS, 'score', gaussian.Kind(lambda signal, noise, x0, eps: -eps / noise, predict))
    x0, eps = jnp.array([0.5, -1.0]), jnp.array([0.3, -2.0])
    sch = SCHEDULES['jsd']
    x_t, output = gaussian.q_sample(sch, x0, 90, eps), gaussian.target(sch, 'score', x0, 90, eps)
    np.testing.assert_allclose(output, -eps / np.sqrt(1 - EXACT['jsd'][90]), rtol=1e-5)
    found = gaussian.predict(sch, 'score', output, x_t, 90)
    np.testing.assert_allclose(found, [x0, eps], rtol=1e-5)
    with pytest.raises(ValueError, match=r"from score .* use kind 'x0' or 'v'"):
        gaussian.predict(sch, 'score', output, x_t, T)
