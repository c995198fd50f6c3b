"""The importance-weighted bound against chains whose evidence is known, and against float64."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import schedule
from diffusion.likelihood.decoder import DECODERS
from diffusion.likelihood.importance import importance_bound, log_weight
from diffusion.likelihood.ledger import importance_bounds
from diffusion.schedule import timesteps
from tests.likelihood_oracles import Chains, LinearNet, alpha_bar, assert_mean, line, tiny_net

KEY = jax.random.key(0)
BETAS, X0 = [0.1, 0.2, 0.3, 0.4], 0.7  # the counterexample of docs/derivation.md
A_BAR = np.cumprod(np.append(1.0, 1 - np.array(BETAS)))
NET = LinearNet.of_reverse_means([0.9, 0.85, 0.8, 0.7], A_BAR)
VARIANCE = np.array([0.25, 0.2, 0.15, 0.08])
CHAINS = Chains(NET, [4, 3, 2, 1, 0], 1.0, VARIANCE)


@functools.partial(jax.jit, static_argnames='samples')
def small_bound(key, sch, x0, samples):
    how = dict(kind='eps', variance=VARIANCE, decoder='gaussian', samples=samples)
    return importance_bound(key, sch, line(NET.output('eps')), x0, **how)


@pytest.mark.slow
def test_it_rises_to_the_evidence():
    """It starts at the ELBO for K = 1; in expectation it is below log p(x_0), by about var(w)/(2K·p²)."""
    log_p = CHAINS.log_p(X0)
    np.testing.assert_allclose(log_p, -1.0708, atol=1e-3)  # published, from a simulation
    sch, counts = schedule.from_betas(BETAS), {1: 100_000, 8: 100_000, 64: 25_000}
    bounds = {k: np.asarray(small_bound(KEY, sch, jnp.full(n, X0), k), np.float64) for k, n in counts.items()}
    assert_mean(bounds[1], sum(map(np.sum, CHAINS.elbo(X0))))
    assert_mean(np.exp(bounds[1] - log_p), 1)
    spread = np.exp(bounds[1] - log_p).var()
    for k in (8, 64):
        error = bounds[k].std() / np.sqrt(counts[k])
        assert bounds[k].mean() < log_p + 4.5 * error
        assert_mean(np.exp(bounds[k] - log_p), 1)
        gap = log_p - bounds[k].mean()
        assert abs(gap - spread / (2 * k)) < 4.5 * error + 0.5 * spread / (2 * k)
    assert bounds[1].mean() < bounds[8].mean() - 0.01 < bounds[64].mean()


@pytest.mark.parametrize(
    'levels, eta, variance, shape',
    [
        pytest.param(None, 1.0, 'small', (8,), marks=pytest.mark.slow),
        ([12, 7, 4, 3, 1, 0], 1.0, 'large', (2, 2, 2)),
        ([12, 7, 4, 3, 1, 0], 0.6, 'small', (2, 2, 2)),
        pytest.param([11, 6, 0], 0.3, 'small', (), marks=pytest.mark.slow),
        pytest.param([12, 0], 0.5, [0.7], (1,), marks=pytest.mark.slow),
    ],
)
def test_one_trajectory_is_the_elbo_and_unbiased_for_the_evidence(levels, eta, variance, shape):
    a, x0 = alpha_bar('jsd', 12), np.linspace(-0.5, 0.7, int(np.prod(shape))).reshape(shape)
    net = LinearNet.of_data(0.2, 0.5, a)
    variance = variance if isinstance(variance, str) else np.array(variance)
    chains = Chains(net, np.arange(12, -1, -1) if levels is None else levels, eta, variance)

    @jax.jit
    def program(key, sch):
        images = jnp.broadcast_to(jnp.asarray(x0, jnp.float32), (50_000, *shape))
        how = dict(kind='v', samples=1, timesteps=levels, eta=eta, variance=variance, decoder='gaussian')
        return importance_bound(key, sch, line(net.output('v')), images, **how)

    found = np.asarray(program(KEY, schedule.jsd(12)), np.float64)
    assert found.shape == (50_000,)
    assert_mean(found, sum(map(np.sum, chains.elbo(x0))))
    weights = np.exp(found - chains.log_p(x0))
    if weights.max() < 100:  # with heavier tails the standard error means nothing
        assert_mean(weights, 1)


@functools.partial(jax.jit, static_argnames='samples')
def tiny_bound(key, sch, weights, x0, samples):
    net = functools.partial(tiny_net, weights)
    how = dict(kind='v', variance='large', timesteps=[6, 4, 3, 1, 0], decoder='gaussian', samples=samples)
    return importance_bound(key, sch, net, x0, **how)


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_it_does_not_fall_as_the_samples_double(seed):
    """IWAE's theorem 1 for random networks, within 4.5 standard errors of paired differences."""
    rng = np.random.default_rng(seed)
    weights = [jnp.asarray(rng.normal(0, s, shape), jnp.float32) for s, shape in [(1.0, (3, 5)), (0.5, (5,))]]
    x0 = jnp.broadcast_to(jnp.array([-65, 201], jnp.float32) / 255, (10_000, 2))
    key, sch = jax.random.key(seed), schedule.cosine(6)
    bounds = [np.asarray(tiny_bound(key, sch, weights, x0, k), np.float64) for k in (1, 2, 4)]
    assert np.all(np.isfinite(bounds))
    for fewer, more in itertools.pairwise(bounds):
        assert (more - fewer).mean() > -4.5 * (more - fewer).std() / 100


def recorded(monkeypatch, program):
    """Run the compiled program; return its result and every normal draw that it makes, in order."""
    draws, normal = [], jax.random.normal

    def recording(*args, **how):
        draw = normal(*args, **how)
        jax.debug.callback(lambda draw: draws.append(np.array(draw)), draw, ordered=True)
        return draw

    with monkeypatch.context() as patch:
        patch.setattr(jax.random, 'normal', recording)
        result = np.asarray(jax.jit(program)(), np.float64)
    jax.effects_barrier()
    return result, draws


def test_float32_holds_log_weights_of_images(monkeypatch):
    """3072 pixels, T = 200, a bad network: tens of thousands of nats below 0, with a relative error of 1e-6."""
    T = 200
    sch = schedule.linear(T, 5e-4, 0.1)
    table = np.exp(np.asarray(sch.log_alpha_bar, np.float64))  # ᾱ of the float32 table, whose rounding is not tested
    net = LinearNet.of_data(-0.8, 0.05, table)
    levels = timesteps(T, 50)
    chains = Chains(net, levels, 1.0)
    x0 = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)

    def program(key):
        how = dict(kind='x0', samples=2, timesteps=levels, decoder='gaussian')
        return importance_bound(key, sch, line(net.output('x0')), x0, **how)

    found, draws = recorded(monkeypatch, lambda: program(KEY))
    assert len(draws) == 2 * 50 and all(draw.shape == x0.shape for draw in draws)
    correlation = np.corrcoef([draw.ravel() for draw in draws])  # no draw is used twice
    assert np.abs(correlation - np.eye(100)).max() < 6 / np.sqrt(x0.size)
    log_weights = [chains.log_weight(x0, draws[:50]), chains.log_weight(x0, draws[50:])]
    exact = scipy.special.logsumexp(log_weights, axis=0) - np.log(2)
    assert np.all(exact < -20_000)
    np.testing.assert_allclose(found, exact, rtol=2e-6)
    np.testing.assert_allclose(np.asarray(jax.jit(program)(KEY), np.float64), exact, rtol=2e-6)


def test_long_chains_lose_no_digits(monkeypatch):
    """20,000 terms in float32: without compensation their sum would be off by nats."""
    T, term, last = 20_000, np.float32(-1.1), np.float32(-12_345.678)
    monkeypatch.setattr('diffusion.likelihood.importance.log_ratio', lambda z, *_: jnp.full(z.shape[:1], term))
    monkeypatch.setitem(DECODERS, 'known', lambda x0, *_: jnp.full(x0.shape, last))
    how = dict(kind='x0', decoder='known')
    program = jax.jit(lambda key: log_weight(key, schedule.linear(T), lambda x_t, t: x_t, jnp.zeros((2, 1)), **how))
    exact = math.fsum([*T * [float(term)], float(last)])  # x_T, and each pair
    np.testing.assert_allclose(np.asarray(program(KEY), np.float64), exact, rtol=2e-7)
    added = np.add.accumulate(np.append(np.full(T, term), last), dtype=np.float32)[-1]
    assert abs(added - exact) > 1  # so that the test can fail


def test_the_ledger_combines_trajectories_as_the_bound_does():
    log_weights = np.array([[-30_000.0, 5.0], [-30_001.0, 5.0], [-29_990.0, 5.0], [-31_000.0, 5.0]])
    bounds = importance_bounds(log_weights)
    assert sorted(bounds) == [1, 2, 4]
    np.testing.assert_allclose(bounds[2][0], [-30_000 + np.log((1 + np.exp(-1)) / 2), 5.0], rtol=1e-12)
    np.testing.assert_allclose(bounds[4][0][0], -29_990 + np.log((1 + np.exp(-10) + np.exp(-11)) / 4), rtol=1e-12)
    for k in bounds:
        np.testing.assert_allclose(bounds[k][1][1], k)  # equal weights: each counts in full
        assert 1 <= bounds[k][1][0] <= k


@pytest.mark.slow
def test_the_program_grows_neither_with_samples_nor_with_levels():
    def size(T, samples):
        def program(x0):
            return importance_bound(KEY, schedule.linear(T), lambda x_t, t: x_t, x0, kind='eps', samples=samples)

        return jax.jit(program).lower(jnp.zeros((2, 3))).as_text().count('\n')

    assert size(10, 2) == size(1000, 2) == size(10, 1000)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'samples': 0}, 'samples is 0'),
        ({'samples': -3}, 'samples is -3'),
        ({'eta': 0.0}, 'infinite'),
        ({'variance': 'huge'}, "'small', 'large'"),
        ({'decoder': 'laplace'}, "'laplace'"),
        ({'timesteps': [5, 1]}, 'decrease to 0'),
    ],
)
def test_arguments_without_a_bound_are_an_error(change, message):
    how = dict(schedule=schedule.linear(5), net=lambda x_t, t: x_t, x0=jnp.zeros((2, 3)), kind='eps', samples=2)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: importance_bound(KEY, **(how | change)))
