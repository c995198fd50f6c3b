"""The evidence lower bound against chains whose every term is known."""

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
from diffusion.likelihood.elbo import FORMS, elbo
from diffusion.schedule import timesteps
from tests import oracles
from tests.likelihood_oracles import (
    DESIGN,
    Chains,
    LinearNet,
    alpha_bar,
    assert_mean,
    exact_expectations,
    line,
    tiny_net,
)

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.4  # of Gaussian data
TOTALS = {'posterior': -1.1616, 'transition': -1.1616, 'printed': -2.9876}  # FIELD.md §1.5, and so the next lines
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
    """The published figures come from a simulation: a Monte-Carlo error of 2e-4, more for the form as printed."""
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


@functools.partial(jax.jit, static_argnames='form')
def small_terms(key, x0, output, form):
    return elbo(
        key,
        schedule.from_betas(BETAS),
        line(output),
        x0,
        kind='eps',
        form=form,
        decoder='gaussian',
        variance=SMALL_VARIANCE,
    )


@pytest.mark.parametrize('form', FORMS)
def test_the_false_step_of_the_derivation(form):
    """Eq. (9) as printed is not the ELBO, and ours shows it: every term, and the published sums."""
    terms = small_terms(KEY, jnp.full(400_000, X0), SMALL_NET.output('eps'), form)
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
def test_the_standard_error_is_what_repetition_says(form):
    """Images of a batch are independent of each other, and so are keys."""
    repetitions, batch = 400, 64
    x0, output = jnp.full(batch, X0), SMALL_NET.output('eps')
    keys = jax.random.split(jax.random.key(3), repetitions)
    totals = np.asarray(jax.jit(jax.vmap(lambda key: small_terms(key, x0, output, form).total()))(keys), np.float64)
    claimed = np.sqrt((totals.var(axis=1, ddof=1) / batch).mean())
    kurtosis = scipy.stats.kurtosis(totals.mean(axis=1)) + 2
    assert abs(totals.mean(axis=1).std(ddof=1) / claimed - 1) < 4.5 * np.sqrt(kurtosis / (4 * repetitions))
    assert_mean(totals.mean(axis=1), sum(map(np.sum, SMALL.elbo(X0, form))))


# Gaussian data: every term, every schedule, without Monte-Carlo noise.


def pixels(shape):
    return np.linspace(-0.9, 1.0, int(np.prod(shape))).reshape(shape)


@pytest.mark.parametrize(
    'T, levels, kind, eta, variance, shape',
    [
        (10, None, 'v', 1.0, 'small', ()),
        (10, None, 'eps', 0.4, [0.9, 0.5, 0.3, 0.2, 0.2, 0.1, 0.05, 0.04, 0.02, 0.03], (1,)),
        (10, [9, 6, 2, 1, 0], 'eps', 1.0, 'large', (2, 2, 2)),
        (10, [10, 0], 'v', 0.5, 'small', (8,)),
        (1000, None, 'v', 1.0, 'small', (8,)),
        (1000, None, 'x0', 0.5, 'small', ()),
        (1000, timesteps(1000, 28, 'quad'), 'v', 0.3, 'large', (8,)),
        (1000, timesteps(1000, 7, 'leading'), 'eps', 0.8, 'small', (2, 2, 2)),
    ],
)
def test_every_term_of_gaussian_data(monkeypatch, T, levels, kind, eta, variance, shape):
    exact_expectations(monkeypatch)
    x0 = pixels(shape)
    how = dict(kind=kind, eta=eta, decoder='gaussian', timesteps=levels)
    how['variance'] = variance if isinstance(variance, str) else np.array(variance)

    @jax.jit
    def program(sch, output):
        images = jnp.broadcast_to(jnp.asarray(x0, jnp.float32), (DESIGN, *shape))
        return {form: elbo(KEY, sch, line(output), images, form=form, **how) for form in FORMS}

    levels = np.arange(T, -1, -1) if levels is None else levels
    for name, make in schedule.SCHEDULES.items():
        if name == 'jsd' and kind == 'eps' and levels[0] == T:
            continue  # refused: tested below
        # β_t is a difference of two entries of a float32 table: terms are compared at the table's own ᾱ, sums at the
        # schedule's.
        table = np.exp(np.asarray(make(T).log_alpha_bar, np.float64))
        chains, ideal = (
            Chains(LinearNet.of_data(MEAN, STD, a), levels, eta, how['variance']) for a in (table, alpha_bar(name, T))
        )
        for form, terms in program(make(T), LinearNet.of_data(MEAN, STD, table).output(kind)).items():
            assert terms.reconstruction.shape == terms.prior.shape == (DESIGN,)
            assert terms.consistency.shape == (DESIGN, len(levels) - 2)
            found, exact = [term.mean(axis=0) for term in parts(terms)], chains.elbo(x0, form)
            scale = np.abs(np.concatenate([np.ravel(e) for e in exact])).max()
            for f, e in zip(found, exact, strict=True):
                np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-5 * scale, err_msg=f'{name} {form}')
            np.testing.assert_allclose(
                sum(map(np.sum, found)), sum(map(np.sum, ideal.elbo(x0, form))), rtol=1e-4, err_msg=f'{name} {form}'
            )


def test_the_loss_of_one_level_is_a_difference_of_signal_to_noise_ratios():
    """L_{t−1} = ½(SNR(t−1) − SNR(t))·‖x_0 − x̂_0‖² (arXiv:2107.00630 Eq. 13) with β̃ at η = 1, whatever x_t is."""
    x0 = pixels((8,))

    @functools.partial(jax.jit, static_argnames='levels')
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


@functools.partial(jax.jit, static_argnames='form')
def tiny_terms(key, weights, x0, form):
    return elbo(
        key,
        schedule.cosine(6),
        functools.partial(tiny_net, weights),
        x0,
        kind='v',
        form=form,
        eta=0.7,
        variance='large',
        timesteps=[6, 4, 3, 1, 0],
    )


weights = st.integers(0, 2**31).map(
    lambda seed: [
        jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)
        for scale, shape in [(1.0, (3, 5)), (0.5, (5,))]
    ]
)


@settings(max_examples=8)
@given(weights, st.integers(0, 2**31))
def test_two_forms_have_one_expectation(weights, seed):
    """Also of another network than the best, with the discretised decoder; the transition form is the noisier."""
    x0 = jnp.broadcast_to(jnp.round(127.5 * (jnp.array([-0.5, 0.8]) + 1)) / 127.5 - 1, (20_000, 2))
    keys = jax.random.split(jax.random.key(seed))
    posterior, transition = (
        tiny_terms(key, weights, x0, form) for key, form in zip(keys, ('posterior', 'transition'), strict=True)
    )
    totals = [np.asarray(terms.total(), np.float64) for terms in (posterior, transition)]
    error = np.sqrt(sum(total.var() for total in totals) / len(x0))
    assert abs(totals[0].mean() - totals[1].mean()) < 4.5 * error
    noises = [np.asarray(t.prior + t.consistency.sum(axis=1)).var() for t in (posterior, transition)]
    assert noises[0] < noises[1]


# A few of the levels.


@functools.partial(jax.jit, static_argnames=('form', 'levels'))
def some_terms(key, x0, output, form, levels):
    return elbo(key, schedule.cosine(12), line(output), x0, kind='v', form=form, decoder='gaussian', levels=levels)


def some_levels(*args):
    return some_terms(*args).consistency


@pytest.mark.parametrize('form', ['posterior', 'transition'])
@pytest.mark.parametrize('levels', [1, 4, 11])
def test_some_levels_have_the_expectation_of_all(form, levels):
    net = LinearNet.of_data(0.8, 0.1, alpha_bar('cosine', 12))  # and x_0 is far off: the levels are very unequal
    exact = Chains(net, np.arange(12, -1, -1), 1.0).elbo(-0.3, form)[2]
    found = np.asarray(some_levels(KEY, jnp.full(100_000, -0.3), net.output('v'), form, levels), np.float64)
    assert found.shape == (100_000, levels)
    assert_mean(found.sum(axis=1), exact.sum())
    if levels == 11:
        for i in range(11):
            assert_mean(found[:, i], exact[i])
    if levels == 1:  # each image draws its own level, and every level is drawn as often
        values = 11 * exact
        spread = found[:, 0].var() - (values**2).mean() + values.mean() ** 2  # what is left is noise within levels
        assert spread > -4.5 * found[:, 0].var() * np.sqrt(scipy.stats.kurtosis(found[:, 0]) + 2) / np.sqrt(100_000)
    error = found.sum(axis=1).std() / np.sqrt(len(found))
    keys = jax.random.split(jax.random.key(1), 20)
    means = [some_levels(key, jnp.full(100_000, -0.3), net.output('v'), form, levels).sum(1).mean() for key in keys]
    assert 0.45 < np.std(means, ddof=1) / error < 1.7  # of χ² with 19 degrees of freedom, at 4.5 standard deviations


def test_more_strata_are_less_noise():
    net = LinearNet.of_data(0.8, 0.1, alpha_bar('cosine', 12))
    stds = [
        np.asarray(some_levels(KEY, jnp.full(100_000, -0.3), net.output('v'), 'posterior', levels)).sum(axis=1).std()
        for levels in (1, 4, 11)
    ]
    assert stds[0] > stds[1] > stds[2]


@pytest.mark.parametrize('form', ['posterior', 'transition'])
def test_the_standard_error_of_the_draws_is_what_repetition_shows(form):
    """Never too small; exact but for how far neighbouring terms differ in the mean."""
    net = LinearNet.of_data(0.8, 0.1, alpha_bar('cosine', 12))
    exact = Chains(net, np.arange(12, -1, -1), 1.0).elbo(-0.3, form)[2]
    for levels in (1, 2, 5, 10, 11):
        terms = some_terms(KEY, jnp.full(100_000, -0.3), net.output('v'), form, levels)
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
    @functools.partial(jax.jit, static_argnames='how')
    def program(value, how):
        x0 = jnp.full((3, 2), 0.5)
        return elbo(KEY, schedule.linear(10), lambda x_t, t: jnp.full_like(x_t, value), x0, kind='x0', **dict(how))

    def terms(value, **how):
        return program(value, tuple(how.items()))

    for clipped, plain in zip(terms(3.0, clip=True), terms(1.0), strict=True):
        np.testing.assert_allclose(clipped, plain, rtol=1e-6)
    assert np.all(terms(3.0).consistency < 2 * terms(3.0, clip=True).consistency)
    assert np.all(terms(3.0).reconstruction < terms(3.0, clip=True).reconstruction)


def test_the_bound_of_one_step():
    """x_T alone: no consistency terms, in any form, and the same bound in all."""
    how = dict(kind='x0', decoder='gaussian', timesteps=[10, 0], eta=0.3)

    @jax.jit
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
def test_what_has_no_bound_is_refused(change, message):
    how = dict(schedule=schedule.linear(10), net=lambda x_t, t: x_t, x0=jnp.zeros((2, 3)), kind='eps')
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: elbo(KEY, **(how | change)))
