"""The density of the probability-flow ODE against linear flows, and against its integral, 1."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from diffusion import schedule
from diffusion.likelihood.flow import EXACT_UP_TO, flow, flow_bound, log_density
from tests.likelihood_oracles import (
    DESIGN,
    QUICK,
    Chains,
    GaussianFlow,
    LinearNet,
    alpha_bar,
    assert_mean,
    exact_expectations,
    log_normal,
)

KEY = jax.random.key(0)
jit = functools.partial(jax.jit, compiler_options=QUICK)
T = 100
STRONG = dict(beta_start=1e-3, beta_end=0.2)  # so that 100 levels end in noise


def data(name, T=T, **how):
    return GaussianFlow(0.3, 0.4, alpha_bar(name, T, **how))


@pytest.mark.parametrize('name', ['linear', 'jsd'])
def test_oracle_solves_the_ode(name):
    """dx/dt = −½·β(t)·(x + ∇log q_t(x)), β(t) = −d log ᾱ/dt level by level (arXiv:2011.13456 Eq. 13), in float64."""
    exact = data(name)
    log_a = np.log(exact.alpha_bar[:-1] if name == 'jsd' else exact.alpha_bar)
    for start in (-1.0, 0.2, 2.0):
        x, log_slope = start, 0.0
        for t in range(1, len(log_a) - 1):
            beta = log_a[t] - log_a[t + 1]

            def velocity(u, state, t=t, beta=beta):
                a = np.exp(log_a[t] - (u - t) * beta)
                var = a * exact.std**2 + 1 - a
                score = -(state[0] - np.sqrt(a) * exact.mean) / var
                return [-0.5 * beta * (state[0] + score), -0.5 * beta * (1 - 1 / var)]

            x, log_slope = scipy.integrate.solve_ivp(
                velocity, (t, t + 1), [x, log_slope], rtol=1e-9, atol=1e-11, method='DOP853'
            ).y[:, -1]
        np.testing.assert_allclose(log_normal(x, 0, 1) + log_slope, exact.log_density(start), rtol=1e-7)


@functools.partial(jit, static_argnames='kind')
def gaussian_density(x, sch, table, kind, level):
    return log_density(KEY, sch, GaussianFlow(0.3, 0.4, None).net_of(kind, table), x, kind=kind, level=level)


@pytest.mark.parametrize('level', [1, 40])
@pytest.mark.parametrize('name', sorted(schedule.SCHEDULES))
@pytest.mark.parametrize('kind, shape', [('eps', ()), ('x0', (1,)), ('v', (8,)), ('x0', (2, 2, 2))])
def test_the_density_of_gaussian_data(kind, shape, name, level):
    """At clean and at noisy levels, near the data and far from it; for kind 'eps' too jsd stops at T−1."""
    how = {key: STRONG[key] for key in inspect.signature(schedule.SCHEDULES[name]).parameters if key in STRONG}
    exact = data(name, **how)
    x = np.linspace(-1.5, 2, 9 * int(np.prod(shape))).reshape(9, *shape).astype(np.float32)
    sch, table = schedule.SCHEDULES[name](T, **how), exact.log_alpha_bar()
    found, _, num_steps = gaussian_density(x, sch, table, kind, level)
    expected = exact.log_density(x, level).reshape(9, -1).sum(axis=1)
    assert found.shape == (9,) and num_steps > 3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


MIXING = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)


def coupled(x, t):
    """A nonlinear network that is not the gradient of a function: the pixels act on each other asymmetrically."""
    return 0.5 * x + 0.5 * jnp.tanh(x @ MIXING + t[:, None] / 20)


@functools.partial(jit, static_argnames='probes')
def coupled_density(key, x, probes):
    return log_density(key, schedule.cosine(20), coupled, x, kind='eps', probes=probes)


@pytest.mark.slow
def test_probes_are_unbiased_for_the_exact_divergence():
    x = jnp.broadcast_to(jnp.array([0.5, -1.0, 0.1, 1.3]), (2000, 4))
    exact = coupled_density(KEY, x[:2], 0)
    np.testing.assert_array_equal(exact.probe_error, 0)
    exact = exact.nats
    for probes in (1, 3):
        density = coupled_density(KEY, x, probes)
        found, errors = (np.asarray(values, np.float64) for values in density[:2])
        assert_mean(found, float(exact[0]), atol=1e-3)  # of the solver
        assert found.std() > 0.01
        if probes == 1:
            one = found.std()
            assert np.isnan(errors).all()  # a single draw has no error estimate
        else:  # 2000 estimates with 2 degrees of freedom each: 10 % is 4.5 standard deviations
            assert (errors**2).mean() == pytest.approx(found.var(), rel=0.15)
    assert abs(one / found.std() / np.sqrt(3) - 1) < 0.2
    assert np.std(coupled_density(jax.random.key(1), x, 3).nats - coupled_density(KEY, x, 3).nats) > 0.01


@pytest.mark.slow
def test_the_probes_of_an_image_do_not_depend_on_the_size_of_its_batch():
    """Batches are padded to a multiple of the number of devices."""
    x = jnp.linspace(-1, 1, 20).reshape(5, 4)
    some, all_of_them = coupled_density(KEY, x[:3], 2), coupled_density(KEY, x, 2)
    np.testing.assert_allclose(some.nats, all_of_them.nats[:3], rtol=0, atol=2e-3)  # of the solver, whose steps differ
    np.testing.assert_allclose(some.probe_error, all_of_them.probe_error[:3], rtol=0, atol=2e-3)
    assert float(some.probe_error.min()) > 0.01  # other probes would show


def test_the_divergence_is_exact_to_16_dimensions_and_estimated_beyond():
    def densities(size):
        x = jnp.linspace(-1, 1, size).reshape(1, size)

        @jit
        def program(key):
            net = lambda x, t: 0.5 * x + 0.3 * jnp.tanh(jnp.roll(x, 1, axis=1) + x)  # noqa: E731
            return log_density(key, schedule.cosine(10), net, x, kind='v', rtol=1e-3, atol=1e-3).nats[0]

        return [float(program(jax.random.key(seed))) for seed in range(3)]

    assert EXACT_UP_TO == 16
    assert len(set(densities(16))) == 1
    assert len(set(densities(17))) == 3


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['eps', 'v'])
def test_the_density_integrates_to_one(kind):
    """For any network: a divergence with a wrong sign or factor would not conserve probability."""

    def net(x, t):
        return 0.6 * x + 0.4 * jnp.tanh(3 * x - 0.5) * (1 + 0.02 * t.reshape(-1, *(1,) * (x.ndim - 1)))

    grid = jnp.linspace(-9, 9, 4001)
    sch = schedule.linear(10, 0.02, 0.4)
    density = jit(lambda x: log_density(KEY, sch, net, x, kind=kind).nats)(grid)
    density = np.exp(np.asarray(density, np.float64))
    assert density[0] < 1e-6 and density[-1] < 1e-6
    assert np.abs(density - np.exp(log_normal(np.asarray(grid), 0, 1))).max() > 0.05  # not the normal itself
    np.testing.assert_allclose(scipy.integrate.simpson(density, x=np.asarray(grid)), 1, atol=2e-4)


@pytest.mark.parametrize(
    'name, kind, variance, shape',
    [('cosine', 'v', 'small', (8,)), ('jsd', 'x0', 'large', ()), ('jsd', 'v', None, (1,))],
)
def test_the_bound_of_gaussian_data(monkeypatch, name, kind, variance, shape):
    """Every term in expectation, and its sum below the evidence of the same model."""
    exact_expectations(monkeypatch)
    variance = np.linspace(0.3, 0.02, T) if variance is None else variance
    exact = data(name)
    chains = Chains(LinearNet.of_data(exact.mean, exact.std, exact.alpha_bar), np.arange(T, -1, -1), 1.0, variance)
    x0 = np.linspace(-0.5, 0.8, int(np.prod(shape))).reshape(shape)

    @jit
    def program(x0):
        how = dict(kind=kind, variance=variance, decoder='gaussian')
        return flow(KEY, schedule.SCHEDULES[name](T), exact.net(kind), x0, **how)

    terms = program(jnp.broadcast_to(jnp.asarray(x0, jnp.float32), (DESIGN, *shape)))
    expected = exact.bound(x0, chains)
    for found, value in zip(terms[:3], expected, strict=True):
        assert found.shape == (DESIGN,)
        np.testing.assert_allclose(np.asarray(found, np.float64).mean(), value, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(terms.total(), sum(terms[:3]), rtol=1e-6)
    assert sum(expected) < exact.log_p(x0, chains)
    np.testing.assert_allclose(terms.total().mean(), sum(expected), rtol=2e-4, atol=2e-4)


def test_the_bound_is_unbiased_for_the_evidence():
    """With true draws: E exp(bound) = p(x_0) and E bound ≤ log p(x_0)."""
    exact, x0 = data('jsd', 10), jnp.full((20_000,), 0.6)
    chains = Chains(LinearNet.of_data(exact.mean, exact.std, exact.alpha_bar), np.arange(10, -1, -1), 1.0, 'large')
    how = dict(kind='v', variance='large', decoder='gaussian')
    bound = jit(lambda x0: flow_bound(KEY, schedule.jsd(10), exact.net('v'), x0, **how))(x0)
    log_p = exact.log_p(0.6, chains)
    assert_mean(bound, sum(exact.bound(0.6, chains)), atol=1e-4)
    assert_mean(np.exp(np.asarray(bound, np.float64) - log_p), 1, atol=1e-4)
    assert bound.mean() < log_p


@pytest.mark.parametrize(
    'change, message',
    [
        ({'probes': -1}, 'probes is -1'),
        ({'decoder': 'laplace'}, "'laplace'"),
        ({'variance': 'huge'}, "'small', 'large'"),
        ({'kind': 'noise'}, 'eps, x0, v'),
        ({'schedule': schedule.jsd(1), 'kind': 'v'}, r'starts at level 1, but ᾱ is 0 there.*use more levels'),
    ],
)
def test_arguments_without_a_bound_are_an_error(change, message):
    how = dict(schedule=schedule.linear(5), net=lambda x_t, t: x_t, x0=jnp.zeros((2, 3)), kind='eps')
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: flow_bound(KEY, **(how | change)))
