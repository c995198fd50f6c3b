"""The evidence lower bound against chains whose every term is known.

Jitted functions take the schedule as an argument. As a constant, XLA would evaluate everything that depends on it alone
at compile time, which is slow.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import schedule
from diffusion.likelihood.decoder import DECODERS
from diffusion.likelihood.elbo import FORMS, Form, Terms, elbo, kl
from diffusion.schedule import timesteps
from tests import oracles
from tests.likelihood_oracles import (
    DESIGN,
    QUICK,
    Chains,
    LinearNet,
    alpha_bar,
    assert_mean,
    exact_expectations,
    kl_normal,
    line,
    tiny_net,
)
from tests.xla_flags import FUSED

KEY = jax.random.key(0)
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
fused_jit = functools.partial(jax.jit, compiler_options=QUICK | FUSED)
MEAN, STD = 0.3, 0.4  # of Gaussian data
TOTALS = {'posterior': -1.1616, 'transition': -1.1616, 'printed': -2.9876}  # docs/derivation.md, as the next lines
CONSISTENCY = {'transition': -0.553, 'printed': -2.379}
BETAS, X0 = [0.1, 0.2, 0.3, 0.4], 0.7
SMALL_A_BAR = np.cumprod(np.append(1.0, 1 - np.array(BETAS)))
SMALL_NET = LinearNet.of_reverse_means([0.9, 0.85, 0.8, 0.7], SMALL_A_BAR)
SMALL_VARIANCE = np.array([0.25, 0.2, 0.15, 0.08])  # the first pair first
SMALL = Chains(SMALL_NET, [4, 3, 2, 1, 0], 1.0, SMALL_VARIANCE)


def parts(terms):
    return [np.asarray(term, np.float64) for term in terms]


# The closed forms themselves.


def test_oracle_knows_the_counterexample_of_the_derivation():
    """The published figures come from a simulation with a standard error of 2e-4, more for the form as printed."""
    np.testing.assert_allclose(SMALL.A, [0.7, 0.8, 0.85, 0.9], rtol=1e-12)
    for form, total in TOTALS.items():
        reconstruction, prior, consistency = SMALL.elbo(X0, form)
        np.testing.assert_allclose(reconstruction + prior + consistency.sum(), total, atol=2e-3)
    for form, value in CONSISTENCY.items():
        np.testing.assert_allclose(SMALL.elbo(X0, form)[2].sum(), value, atol=2e-3)
    np.testing.assert_allclose(SMALL.log_p(X0), -1.0708, atol=1e-3)


@pytest.mark.parametrize('eta', [0.2, 0.7, 1.0])
@pytest.mark.parametrize('variance', ['small', 'large'])
@pytest.mark.parametrize('levels', [[20, 0], [20, 10, 0], [19, 12, 5, 3, 1, 0], list(range(20, -1, -1))])
def test_oracle_forms_agree_and_bound_the_evidence(eta, variance, levels):
    a, x0 = alpha_bar('cosine', 20), np.array([0.5, -0.9])
    chains = Chains(LinearNet.of_data(MEAN, STD, a), levels, eta, variance)
    np.testing.assert_allclose(np.diag(chains.covariance), 1 - a[levels[:-1]], rtol=1e-9)
    data = oracles.GaussianData(MEAN, STD, a)
    for i, (t, s) in enumerate(itertools.pairwise(levels)):
        A, b, V = data.step(t, s, eta, variance)
        np.testing.assert_allclose([chains.A[i], chains.b[i]], [A, b], rtol=1e-9)
        assert s == 0 or np.isclose(chains.V[i], V, rtol=1e-12)
    posterior, transition = ([sum(map(np.sum, chains.elbo(x0, form)))] for form in ('posterior', 'transition'))
    np.testing.assert_allclose(posterior, transition, rtol=1e-9)
    assert posterior[0] <= chains.log_p(x0)


# The counterexample, from our functions.


REPETITIONS, BATCH = 400, 1000


@functools.cache
def small_terms():
    """The terms of every form, of 400 keys and 1000 images each."""

    @jax.jit
    def program(keys, sch, x0):
        how = dict(kind='eps', decoder='gaussian', variance=SMALL_VARIANCE)
        net = line(SMALL_NET.output('eps'))
        return {
            form: jax.vmap(lambda key, form=form: elbo(key, sch, net, x0, form=form, **how))(keys) for form in FORMS
        }

    return program(jax.random.split(KEY, REPETITIONS), schedule.from_betas(BETAS), jnp.full(BATCH, X0))


@pytest.mark.parametrize('form', FORMS)
def test_the_false_step_of_the_derivation(form):
    """Eq. (9) as printed is not the ELBO: every term of every form, and the published sums."""
    terms = jax.tree.map(lambda term: term.reshape(REPETITIONS * BATCH, *term.shape[2:]), small_terms()[form])
    reconstruction, prior, consistency = parts(terms)
    exact = SMALL.elbo(X0, form)
    assert consistency.shape == (400_000, 3)
    assert_mean(reconstruction, exact[0])
    assert_mean(prior, exact[1])
    for i in range(3):
        assert_mean(consistency[:, i], exact[2][i])
    assert_mean(np.asarray(terms.total()), TOTALS[form], atol=2e-3)
    assert form not in CONSISTENCY or abs(consistency.sum(axis=1).mean() - CONSISTENCY[form]) < 0.02
    np.testing.assert_allclose(terms.total(), reconstruction + prior + consistency.sum(axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('form', FORMS)
def test_images_and_keys_draw_independently(form):
    """The mean of a batch scatters over keys as much as its standard error over images says."""
    terms = small_terms()[form]
    totals = np.asarray(terms.reconstruction + terms.prior + terms.consistency.sum(axis=2), np.float64)
    claimed = np.sqrt((totals.var(axis=1, ddof=1) / BATCH).mean())
    kurtosis = scipy.stats.kurtosis(totals.mean(axis=1)) + 2
    assert abs(totals.mean(axis=1).std(ddof=1) / claimed - 1) < 4.5 * np.sqrt(kurtosis / (4 * REPETITIONS))
    assert_mean(totals.mean(axis=1), sum(map(np.sum, SMALL.elbo(X0, form))))


# Gaussian data: every term, every schedule, without Monte-Carlo noise.


def pixels(shape):
    return np.linspace(-0.9, 1.0, int(np.prod(shape))).reshape(shape)


@pytest.mark.parametrize(
    'T, levels, kind, eta, variance, shape',
    [
        (10, None, 'v', 1.0, 'small', ()),
        pytest.param(
            10, None, 'eps', 0.4, [0.9, 0.5, 0.3, 0.2, 0.2, 0.1, 0.05, 0.04, 0.02, 0.03], (1,), marks=pytest.mark.slow
        ),
        (10, [9, 6, 2, 1, 0], 'eps', 1.0, 'large', (2, 2, 2)),
        pytest.param(10, [10, 0], 'v', 0.5, 'small', (8,), marks=pytest.mark.slow),
        pytest.param(1000, None, 'v', 1.0, 'small', (8,), marks=pytest.mark.slow),
        (1000, None, 'x0', 0.5, 'small', ()),
        pytest.param(1000, timesteps(1000, 28, 'quad'), 'v', 1.0, 'large', (8,), marks=pytest.mark.slow),
        pytest.param(1000, timesteps(1000, 28, 'quad'), 'v', 0.3, 'small', (8,), marks=pytest.mark.slow),
        pytest.param(1000, timesteps(1000, 7, 'leading'), 'eps', 0.8, 'small', (2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_every_term_of_gaussian_data(monkeypatch, T, levels, kind, eta, variance, shape):
    exact_expectations(monkeypatch)
    x0 = pixels(shape)
    how = dict(kind=kind, eta=eta, decoder='gaussian', timesteps=levels)
    how['variance'] = variance if isinstance(variance, str) else np.array(variance)

    @fused_jit
    def program(sch, output):
        images = jnp.broadcast_to(jnp.asarray(x0, jnp.float32), (DESIGN, *shape))
        return {form: elbo(KEY, sch, line(output), images, form=form, **how) for form in FORMS}

    levels = np.arange(T, -1, -1) if levels is None else levels
    for name, make in schedule.SCHEDULES.items():
        if name == 'jsd' and kind == 'eps' and levels[0] == T:
            continue  # refused: tested below
        net = LinearNet.of_data(MEAN, STD, alpha_bar(name, T))
        chains = Chains(net, levels, eta, how['variance'])
        for form, terms in program(make(T), net.output(kind)).items():
            assert terms.reconstruction.shape == terms.prior.shape == (DESIGN,)
            assert terms.consistency.shape == (DESIGN, len(levels) - 2)
            found, exact = [term.mean(axis=0) for term in parts(terms)], chains.elbo(x0, form)
            scale = np.abs(np.concatenate([np.ravel(e) for e in exact])).max()
            for f, e in zip(found, exact, strict=True):
                np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-5 * scale, err_msg=f'{name} {form}')
            total = sum(map(np.sum, exact))
            np.testing.assert_allclose(sum(map(np.sum, found)), total, rtol=1e-4, err_msg=f'{name} {form}')


def test_the_loss_of_one_level_is_a_difference_of_signal_to_noise_ratios():
    """L_{t−1} = ½(SNR(t−1) − SNR(t))·‖x_0 − x̂_0‖² (arXiv:2107.00630 Eq. 13) with β̃ at η = 1, whatever x_t is."""
    x0 = pixels((8,))

    @functools.partial(quick_jit, static_argnames='levels')
    def program(sch, levels):
        images, how = jnp.asarray(x0, jnp.float32)[None], dict(kind='x0', decoder='gaussian', timesteps=levels)
        return elbo(KEY, sch, lambda x_t, t: jnp.full_like(x_t, 0.2), images, **how)

    for levels in (tuple(range(100, -1, -1)), (100, 71, 33, 10, 2, 0)):
        for name in schedule.SCHEDULES:
            terms, a = program(schedule.SCHEDULES[name](100), levels), alpha_bar(name, 100)[list(levels[:-1])]
            snr = a / (1 - a)
            expected = -0.5 * np.diff(snr) * ((x0 - 0.2) ** 2).sum()
            np.testing.assert_allclose(terms.consistency[0], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


# Nonlinear networks.


@jax.jit
def tiny_terms(key, sch, weights, x0):
    how = dict(kind='v', eta=0.7, variance=np.array([0.8, 0.5, 0.4, 0.1]), timesteps=[6, 4, 3, 1, 0])
    return [
        elbo(key, sch, functools.partial(tiny_net, weights), x0, form=form, **how)
        for form in ('posterior', 'transition')
    ]


weights = st.integers(0, 2**31).map(
    lambda seed: [
        jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)
        for scale, shape in [(1.0, (3, 5)), (0.5, (5,))]
    ]
)


@pytest.mark.slow
@settings(max_examples=8)
@given(weights, st.integers(0, 2**31))
def test_two_forms_have_one_expectation(weights, seed):
    """Also for networks that are not optimal, with the discretised decoder; the transition form has more variance."""
    x0 = jnp.broadcast_to(jnp.round(127.5 * (jnp.array([-0.5, 0.8]) + 1)) / 127.5 - 1, (20_000, 2))
    posterior, transition = tiny_terms(jax.random.key(seed), schedule.cosine(6), weights, x0)
    differences = np.asarray(posterior.total(), np.float64) - np.asarray(transition.total(), np.float64)
    assert_mean(differences, 0)
    noises = [np.asarray(t.prior + t.consistency.sum(axis=1)).var() for t in (posterior, transition)]
    assert noises[0] < noises[1]


# A few of the levels.


FAR_NET = LinearNet.of_data(0.8, 0.1, alpha_bar('cosine', 12))  # x_0 = −0.3 is far off: the levels are very unequal


@functools.cache
def some_terms(form, levels):
    """The terms of 20 keys and 5000 images each with a few of the levels, (100_000,) and (100_000, levels)."""

    @jax.jit
    def program(keys, sch, x0, output):
        how = dict(kind='v', form=form, decoder='gaussian', levels=levels)
        return jax.vmap(lambda key: elbo(key, sch, line(output), x0, **how))(keys)

    terms = program(jax.random.split(KEY, 20), schedule.cosine(12), jnp.full(5000, -0.3), FAR_NET.output('v'))
    return jax.tree.map(lambda term: term.reshape(100_000, *term.shape[2:]), terms)


@pytest.mark.parametrize('form', ['posterior', 'transition'])
@pytest.mark.parametrize('levels', [1, pytest.param(5, marks=pytest.mark.slow), 11])
def test_some_levels_have_the_expectation_of_all(form, levels):
    exact = Chains(FAR_NET, np.arange(12, -1, -1), 1.0).elbo(-0.3, form)[2]
    found = np.asarray(some_terms(form, levels).consistency, np.float64)
    assert found.shape == (100_000, levels)
    assert_mean(found.sum(axis=1), exact.sum())
    if levels == 11:
        for i in range(11):
            assert_mean(found[:, i], exact[i])
    if levels == 1:  # each image draws its own level, and every level is drawn as often
        values = 11 * exact
        spread = found[:, 0].var() - (values**2).mean() + values.mean() ** 2  # what is left is noise within levels
        assert spread > -4.5 * found[:, 0].var() * np.sqrt(scipy.stats.kurtosis(found[:, 0]) + 2) / np.sqrt(100_000)
    error = found.sum(axis=1).std() / np.sqrt(5000)
    means = found.sum(axis=1).reshape(20, 5000).mean(axis=1)  # of each key
    assert 0.45 < np.std(means, ddof=1) / error < 1.7  # of χ² with 19 degrees of freedom, at 4.5 standard deviations


@pytest.mark.slow
def test_each_stratum_draws_its_level_by_itself(monkeypatch):
    indices = FORMS['posterior']._replace(consistency=lambda key, chain, x0, i: i.astype(jnp.float32))
    monkeypatch.setitem(FORMS, 'indices', indices)
    x0 = jnp.zeros((2000, 1))
    how = dict(kind='x0', decoder='gaussian', form='indices', levels=2)  # of 4 terms each
    drawn = elbo(KEY, schedule.linear(9), lambda x_t, t: x_t, x0, **how).consistency / 4
    np.testing.assert_array_equal(np.unique(drawn[:, 0]), [0, 1, 2, 3])
    np.testing.assert_array_equal(np.unique(drawn[:, 1]), [4, 5, 6, 7])
    assert np.abs(np.corrcoef(drawn.T)[0, 1]) < 0.1


def test_more_strata_are_less_noise():
    stds = [np.asarray(some_terms('posterior', levels).consistency).sum(axis=1).std() for levels in (1, 5, 11)]
    assert stds[0] > stds[1] > stds[2]


@pytest.mark.parametrize('form', ['posterior', 'transition'])
def test_the_standard_error_of_the_draws_is_what_repetition_shows(form):
    """It is never too small, and exact but for how far the means of neighbouring terms differ."""
    exact = Chains(FAR_NET, np.arange(12, -1, -1), 1.0).elbo(-0.3, form)[2]
    for levels in (1, 5, 11):
        terms = some_terms(form, levels)
        errors, sums = (np.asarray(values, np.float64) for values in (terms.standard_error(), terms.consistency.sum(1)))
        if levels == 1:
            assert np.isnan(errors).all()
            continue
        assert (errors**2).mean() > 0.97 * sums.var()
        if levels == 11:  # every level by itself: the noise, and the known difference of neighbours
            pairs = [(i, i + 1) for i in range(0, 10, 2)] + [(9, 10)]
            twice = np.asarray(terms.consistency, np.float64)[:, 9].var()  # counts in two pairs
            bias = sum((exact[i] - exact[j]) ** 2 for i, j in pairs)
            assert (errors**2).mean() == pytest.approx(sums.var() + twice + bias, rel=0.1)


@pytest.mark.parametrize('levels', range(2, 12))
def test_the_standard_error_of_independent_terms(levels):
    """The expectation of its square is Σ (var_i + var_j + (mean_i − mean_j)²) over pairs of neighbours."""
    means, stds = 0.3 * np.arange(levels), 1 + np.arange(levels) % 3
    draws = means + stds * np.random.default_rng(levels).normal(size=(100_000, levels))
    errors = np.asarray(Terms(None, None, jnp.asarray(draws)).standard_error(), np.float64)
    pairs = [(i, i + 1) for i in range(0, levels - 1, 2)] + [(levels - 2, levels - 1)] * (levels % 2)
    assert_mean(errors**2, sum(stds[i] ** 2 + stds[j] ** 2 + (means[i] - means[j]) ** 2 for i, j in pairs))


@pytest.mark.slow
def test_the_program_does_not_grow_with_the_levels():
    def size(T, form, levels=None):
        def program(x0):
            return elbo(KEY, schedule.linear(T), lambda x_t, t: x_t, x0, kind='eps', form=form, levels=levels)

        return jax.jit(program).lower(jnp.zeros((2, 3))).as_text().count('\n')

    for form in FORMS:
        assert size(10, form) == size(1000, form)
    assert size(1000, 'posterior', 5) == size(1000, 'posterior', 500)


# Arguments.


def test_clipping_is_off_and_can_be_turned_on():
    @functools.partial(quick_jit, static_argnames='how')
    def program(sch, value, how):
        x0 = jnp.full((3, 2), 0.5)
        how = dict(kind='x0', decoder='gaussian', **dict(how))
        return elbo(KEY, sch, lambda x_t, t: jnp.full_like(x_t, value), x0, **how)

    def terms(value, **how):
        return program(schedule.linear(10), value, tuple(how.items()))

    for clipped, plain in zip(terms(3.0, clip=True), terms(1.0), strict=True):
        np.testing.assert_allclose(clipped, plain, rtol=1e-6)
    assert np.all(terms(3.0).consistency < 2 * terms(3.0, clip=True).consistency)
    assert np.all(terms(3.0).reconstruction < terms(3.0, clip=True).reconstruction)


def test_forms_and_decoders_added_to_the_tables(monkeypatch):
    """A form with a prior of standard deviation 2, and a decoder of Laplace's distribution."""

    def prior(key, chain, x0):
        return -kl(chain.schedule.signal(chain.t[0]) * x0, chain.schedule.noise(chain.t[0]), 0.0, 2.0)

    def consistency(key, chain, x0, i):
        return jnp.asarray(chain.t, jnp.float32)[i]

    monkeypatch.setitem(FORMS, 'wide', Form('wide', '', prior, consistency))
    monkeypatch.setitem(DECODERS, 'laplace', lambda x0, mean, std, bins: -jnp.abs(x0 - mean) / std - jnp.log(2 * std))

    @quick_jit
    def program(sch, x0):
        how = dict(kind='x0', timesteps=[10, 4, 0], variance=np.array([0.1, 0.25]), decoder='laplace', form='wide')
        return elbo(KEY, sch, lambda x_t, t: 0 * x_t, x0, **how)

    x0, a = np.array([[0.5, -0.2]], np.float32), alpha_bar('cosine', 10)[10]
    terms = program(schedule.cosine(10), x0)
    np.testing.assert_allclose(terms.prior[0], -kl_normal(a * x0**2, 1 - a, 4.0).sum(), rtol=1e-5)
    np.testing.assert_allclose(terms.reconstruction[0], scipy.stats.laplace.logpdf(x0, 0, 0.5).sum(), rtol=1e-5)
    np.testing.assert_array_equal(terms.consistency, [[10.0]])


def test_the_bound_of_one_step():
    """x_T alone: no consistency terms, in any form, and the same bound in all."""
    how = dict(kind='x0', decoder='gaussian', timesteps=[10, 0], eta=0.3)

    @quick_jit
    def program(sch):
        x0 = jnp.full((20_000,), 0.5)
        return [elbo(KEY, sch, lambda x_t, t: 0 * x_t, x0, form=form, **how) for form in FORMS]

    for name in ('cosine', 'jsd'):
        a = alpha_bar(name, 10)[10]
        for terms in program(schedule.SCHEDULES[name](10)):
            assert terms.consistency.shape == (20_000, 0)
            assert_mean(terms.prior, -0.5 * (np.log(1 / (1 - a)) + 1 - a + a * 0.25 - 1))
            np.testing.assert_allclose(terms.reconstruction, scipy.stats.norm.logpdf(0.5, 0, np.sqrt(1 - a)), rtol=1e-5)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'eta': 0.0}, 'infinite'),
        ({'eta': 1.5}, 'eta'),
        ({'eta': -0.5}, 'eta'),
        ({'eta': float('nan')}, 'eta'),
        ({'form': 'eq8'}, "'eq8'.*posterior, transition, printed"),
        ({'decoder': 'laplace'}, "'laplace'.*discretized, gaussian"),
        ({'variance': 'huge'}, "'small', 'large'"),
        ({'variance': 'large', 'eta': 0.5}, 'eta=1, not to eta=0.5'),
        ({'variance': np.ones(3)}, 'shape'),
        ({'variance': np.ones(9)}, 'shape'),
        ({'variance': np.zeros(10)}, 'no density'),
        ({'variance': -np.ones(10)}, 'not negative'),
        ({'kind': 'noise'}, 'eps, x0, v'),
        ({'levels': 0}, 'levels is 0.*9 consistency'),
        ({'levels': 10}, 'levels is 10.*9 consistency'),
        ({'levels': -1}, 'levels is -1'),
        ({'levels': 1, 'timesteps': [10, 0]}, '0 consistency'),
        ({'timesteps': [10, 5, 1]}, 'decrease to 0'),
        ({'timesteps': [11, 5, 0]}, 'levels lie in'),
        ({'schedule': schedule.jsd(10)}, "'x0' or 'v'"),
    ],
)
def test_arguments_without_a_bound_are_an_error(change, message):
    how = dict(schedule=schedule.linear(10), net=lambda x_t, t: x_t, x0=jnp.zeros((2, 3)), kind='eps')
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: elbo(KEY, **(how | change)))
