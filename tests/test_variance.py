"""Learned variances (improved DDPM, arXiv:2102.09672) against Gaussian chains whose variances are known."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from diffusion import compat, gaussian, guidance, sampler, schedule
from diffusion.likelihood import flow
from diffusion.likelihood.chain import compare, make_chain
from diffusion.likelihood.elbo import FORMS, elbo
from diffusion.likelihood.importance import importance_bound
from diffusion.loss import (
    WEIGHTINGS,
    draw_by_history,
    importance_weights,
    init_history,
    loss,
    loss_of,
    update_history,
)
from tests import oracles
from tests.likelihood_oracles import DESIGN, QUICK, Chains, LinearNet, assert_mean, exact_expectations, line

T, MEAN, STD = 10, 0.3, 0.4  # of Gaussian data
BETAS = np.linspace(0.02, 0.4, T)
A = np.cumprod(np.append(1.0, 1 - BETAS))
SCH = schedule.from_betas(BETAS)
NET = LinearNet.of_data(MEAN, STD, A)
FULL, SHORT = tuple(range(T, -1, -1)), (9, 6, 2, 1, 0)
V = np.random.default_rng(0).uniform(-1.5, 1.5, (T + 1, 2))  # of each level, for images of two pixels
KEY = jax.random.key(0)
jit = functools.partial(jax.jit, compiler_options=QUICK)


def bounds(levels):
    """β̃ and β of each pair of a chain; at s = 0, where β̃ is 0, that of the pair before."""
    t, s = np.array(levels[:-1]), np.array(levels[1:])
    large = 1 - A[t] / A[s]
    small = large * (1 - A[s]) / (1 - A[t])
    small[-1] = small[-2]
    return small, large


def between(v, levels):
    """The variances (num_steps, pixels) that v (T+1, pixels) stands for: improved DDPM Eq. 15."""
    small, large = (bound[:, None] for bound in bounds(levels))
    f = (v[np.array(levels[:-1])] + 1) / 2
    return large**f * small ** (1 - f)


def with_v(net, v):
    """A net that also returns v (T+1, pixels), level by level."""
    table = jnp.asarray(v, jnp.float32)
    return lambda x_t, t: jnp.concatenate([net(x_t, t), jnp.broadcast_to(table[t.astype(int)], x_t.shape)], axis=-1)


# Likelihoods.


def test_every_term_of_gaussian_data(monkeypatch):
    """Of a short chain and two pixels, whose v differ; a log-weight is that of the same variances as an array."""
    x0 = np.array([-0.4, 0.7])
    how = dict(kind='eps', decoder='gaussian', timesteps=SHORT)
    variances = between(V, SHORT)

    @jit
    def program(output, v):
        images, net = jnp.broadcast_to(jnp.asarray(x0, jnp.float32), (DESIGN, 2)), line(output)
        weights = [
            importance_bound(KEY, SCH, with_v(net, v[:, :1]), images, samples=2, variance='learned', **how),
            importance_bound(KEY, SCH, net, images, samples=2, variance=variances[:, 0], **how),
        ]
        terms = {}
        for form in FORMS:
            with monkeypatch.context() as patch:
                exact_expectations(patch)
                terms[form] = elbo(KEY, SCH, with_v(net, v), images, form=form, variance='learned', **how)
        return terms, weights

    terms, weights = program(NET.output('eps'), V)
    for form in FORMS:
        exact = [Chains(NET, SHORT, 1.0, mine).elbo(x, form) for mine, x in zip(variances.T, x0, strict=True)]
        for term, *expected in zip(terms[form], *exact, strict=True):
            np.testing.assert_allclose(term.mean(axis=0), sum(expected), rtol=1e-4, atol=1e-4, err_msg=form)
    np.testing.assert_allclose(*weights, rtol=1e-5)


def test_the_least_bound_is_that_of_the_true_posterior_variance():
    """x_s given x_t of Gaussian data; there the KL of level t is ½·log(Var[x_s|x_t]/β̃). The levels above 1."""
    columns = scipy.linalg.hadamard(32).T
    t = np.arange(2, T + 1)
    var = A * STD**2 + 1 - A  # of x_t
    true = var[t - 1] - A[t] / A[t - 1] * var[t - 1] ** 2 / var[t]
    small, large = (bound[:-1][::-1] for bound in bounds(FULL))
    best = np.zeros((T + 1, 1))
    best[t, 0] = 2 * np.log(true / small) / np.log(large / small) - 1
    x0, eps = jnp.tile(jnp.float32([MEAN + STD * columns[1], columns[2]])[:, :, None], (1, T - 1, 1))

    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def program(v):
        net = with_v(line(NET.output('v')), v)
        losses = WEIGHTINGS['vlb'].learned(SCH, net, x0, jnp.repeat(jnp.asarray(t), 32), eps, 'v')
        return losses.sum(), losses.reshape(T - 1, 32).mean(axis=1)

    (_, losses), gradient = program(best)
    prior = 0.5 * (A[T] * (MEAN**2 + STD**2) - A[T] - np.log(1 - A[T]))
    np.testing.assert_allclose(losses, (T * 0.5 * np.log(true / small) + prior) / np.log(2), rtol=1e-4)
    (_, gradient_below), (_, gradient_above) = program(best - 0.2), program(best + 0.2)
    assert np.all(gradient_below[2:] < 0) and np.all(gradient_above[2:] > 0)
    assert np.all(np.abs(gradient[2:]) < 1e-3 * gradient_above[2:])


def test_the_ends_of_v_are_the_fixed_variances():
    """p(x_s|x_t) of all pairs, on which likelihoods depend, and samples, from the same draws.

    At s = 0, 'small' and 'large' have β̃ of the pair before, which is v = −1. There v = 1 is β.
    """
    n = len(SHORT) - 1
    x0, eps = np.float32(np.random.default_rng(0).normal(size=(2, n, 2)))

    def all_of(net, variance):
        chain = make_chain(SCH, net, kind='eps', timesteps=SHORT, variance=variance)
        how = dict(shape=(2,), timesteps=SHORT, kind='eps', eta=1.0, variance=variance)
        samples = sampler.sample(jax.random.split(KEY, 3), SCH, net, **how)
        mean, std = compare(chain, x0, eps, jnp.arange(n))[1]
        return mean, jnp.broadcast_to(std, (n, 2)), samples

    @jit
    def program(output):
        net, ends = line(output), (('small', -1.0), ('large', 1.0))
        learned = {end: all_of(with_v(net, np.full((T + 1, 2), v)), 'learned') for end, v in ends}
        return {end: (all_of(net, end), learned[end]) for end, _ in ends}

    for end, ((mean, std, samples), learned) in program(NET.output('eps')).items():
        np.testing.assert_array_equal(learned[0], mean)
        np.testing.assert_allclose(learned[1][:-1], std[:-1], rtol=1e-6)
        np.testing.assert_allclose(learned[2], samples, rtol=0, atol=2e-6)
        np.testing.assert_allclose(std[-1], np.sqrt(bounds(SHORT)[0][-1]), rtol=1e-6)
        last = std[-1] if end == 'small' else np.sqrt(1 - A[SHORT[-2]])
        np.testing.assert_allclose(learned[1][-1], last, rtol=1e-6)


def test_the_only_pair_of_a_chain_leaves_nothing_to_learn():
    for v in (-1, 0.3, 1):
        chain = make_chain(SCH, None, kind='x0', timesteps=[T, 0], variance='learned')
        np.testing.assert_allclose(gaussian.learned_std(v, chain.std, chain.widening), np.sqrt(1 - A[T]), rtol=1e-6)


def test_the_flow_takes_the_mean_from_the_first_half(monkeypatch):
    def density(key, schedule, net, x, **how):
        return flow.Density(net(x, jnp.ones(len(x))).sum(axis=1), 0, 0)

    monkeypatch.setattr(flow, 'log_density', density)
    x0, how = jnp.full((1, 1), 0.2), dict(kind='v', decoder='gaussian')

    def net(x_t, t):
        return 0.5 * x_t

    @jit
    def program(x0):
        both = with_v(net, np.full((T + 1, 1), -1))
        return flow.flow(KEY, SCH, net, x0, **how), flow.flow(KEY, SCH, both, x0, variance='learned', **how)

    for one, other in zip(*program(x0), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize('name', ['linear', 'cosine', 'jsd'])
def test_the_variances_have_all_digits_at_many_levels(name):
    """σ against float64."""
    sch = schedule.SCHEDULES[name](1000)
    t, s = np.arange(1000, 0, -1), np.arange(999, -1, -1)
    std = gaussian.small_std(sch, s, t, eta=1.0)
    found = gaussian.learned_std(jnp.float32(0.4), std, gaussian.log_widening(sch, std, s, t))
    with np.errstate(divide='ignore'):
        log_a = np.concatenate([[0], np.cumsum(np.log1p(-sch.betas()))])
    large = sch.betas()[::-1]
    small = large * np.expm1(log_a[s]) / np.expm1(log_a[t])
    small[-1] = small[-2]
    np.testing.assert_allclose(found, np.sqrt(large**0.7 * small**0.3), rtol=2e-6)


# Sampling.


def test_moments_of_samples_follow_the_exact_recursion():
    """Of two pixels with different v; no noise is added at s = 0."""
    data, count = oracles.GaussianData(MEAN, STD, A), 20_000
    how = dict(shape=(2,), timesteps=SHORT, kind='eps', eta=1.0, variance='learned', clip=False)
    net = with_v(data.net('eps'), V)
    x = np.asarray(jit(lambda keys: sampler.sample(keys, SCH, net, **how))(jax.random.split(KEY, count)), np.float64)
    for pixel, variance in enumerate(between(V, SHORT).T):
        mean, var = data.sample_moments(SHORT, 1.0, variance)
        assert abs(x[:, pixel].mean() - mean) < 4.5 * np.sqrt(var / count)
        assert abs(x[:, pixel].var() - var) < 4.5 * var * np.sqrt(2 / count)


def test_a_rule_gets_a_width_for_each_pixel_and_the_network_is_evaluated_once(monkeypatch):
    calls, widths = [], []

    def net(x_t, t):
        calls.append(t)
        return jnp.concatenate([0.5 * x_t, 0 * x_t], axis=-1)

    def step(state, x_t, t, s, std, *, schedule, predict, noise, eta):
        widths.append(std.shape)
        predict(x_t, t)
        return state, predict(0.9 * x_t, t).x0

    def trace(rule):
        calls.clear()
        how = dict(shape=(2, 3), timesteps=SHORT, kind='v', eta=1.0, variance='learned', rule=rule)
        jax.eval_shape(lambda keys: sampler.sample(keys, SCH, net, **how), jax.random.split(KEY, 4))
        return len(calls)

    monkeypatch.setitem(sampler.RULES, 'twice', sampler.Rule(lambda x_T: (), step))
    assert (trace('kernel'), trace('twice')) == (1, 2)
    assert widths == [(4, 2, 3)]


def test_auto_is_learned_where_it_can_be():
    def chosen(name, **asked):
        asked = dict(num_steps=5, spacing='leading', eta=1.0, variance='auto', clip=True) | asked
        return compat.resolve(name, T, **asked, learned=True)['variance']

    assert [chosen('', eta=eta) for eta in (0.0, 0.5, 1.0)] == ['small', 'small', 'learned']
    assert [chosen(name) for name in ('diffusers', 'diffusers-ddim', 'ddim', 'ho')] == [
        'learned', 'small', 'small', 'large'
    ]  # fmt: skip
    assert chosen('', variance='large') == 'large'
    with pytest.raises(ValueError, match=r"diffusers adds noise at the last step.*spacing 'leading'"):
        chosen('diffusers', spacing='trailing')


# Guidance.


def test_guidance_leaves_the_variance_to_the_net():
    """With the weak net in the same batch and in another, which may learn a variance or not; in an interval."""
    x_t, t = jnp.linspace(-1, 1, 6)[:, None] * jnp.ones((1, 2)), jnp.array([1, 3, 5, 7, 9, 10])

    def mean(c):
        return lambda x_t, t: c * x_t + 0.1

    def learned(c):
        return lambda x_t, t: jnp.concatenate([mean(c)(x_t, t), jnp.full_like(x_t, c)], axis=-1)

    def classes(x_t, t):  # those of the net, then those of the weak net
        c = jnp.tile(jnp.array([0.5, 0.2]), len(x_t) // 2)[:, None]
        return jnp.concatenate([c * x_t + 0.1, c + 0 * x_t], axis=-1)

    pairs = [
        guidance.halves(classes),
        lambda x_t, t: (learned(0.5)(x_t, t), learned(0.2)(x_t, t)),
        lambda x_t, t: (learned(0.5)(x_t, t), mean(0.2)(x_t, t)),
    ]

    @jit
    def program(x_t, t):
        found = {}
        for interval in ((), (0.3, 1.0)):
            how = dict(scale=3.0, interval=interval)
            of_means = guidance.guided(SCH, mean(0.5), lambda x, t: (mean(0.5)(x, t), mean(0.2)(x, t)), **how)(x_t, t)
            found[interval] = of_means, [guidance.guided(SCH, learned(0.5), pair, **how)(x_t, t) for pair in pairs]
        return list(found.values())

    for of_means, outputs in program(x_t, t):
        assert np.abs(of_means - mean(0.5)(x_t, t)).max() > 0.1
        for output in outputs:
            np.testing.assert_allclose(output[:, :2], of_means, rtol=1e-6)
            np.testing.assert_array_equal(output[:, 2:], jnp.full_like(x_t, 0.5))


# Training.


def test_the_hybrid_loss_trains_the_mean_as_l_simple_does():
    rng = np.random.default_rng(1)
    x0 = jnp.asarray(np.round(rng.uniform(-1, 1, (T, 2, 3)) * 127.5 + 0.5) / 127.5 - 1 / 255, jnp.float32).clip(-1, 1)
    eps, output, v = (jnp.asarray(rng.normal(size=x0.shape), jnp.float32) for _ in range(3))
    t = jnp.arange(1, T + 1)

    @jit
    def program(output, v):
        def total(name, output, v):
            net = lambda x_t, t: output if name == 'simple' else jnp.concatenate([output, v], axis=-1)  # noqa: E731
            return loss_of(name, learned=name != 'simple')(SCH, net, x0, t, eps, 'eps').sum()

        return {name: jax.value_and_grad(total, (1, 2))(name, output, v) for name in ('simple', 'vlb', 'hybrid')}

    found = program(output, v)
    (simple, (simple_mean, _)), (vlb, (vlb_mean, vlb_v)), (hybrid, (hybrid_mean, hybrid_v)) = (
        found[name] for name in ('simple', 'vlb', 'hybrid')
    )
    np.testing.assert_array_equal(hybrid_mean, simple_mean)
    np.testing.assert_allclose(hybrid_v, 1e-3 * vlb_v, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(hybrid, simple + 1e-3 * vlb, rtol=1e-6)
    assert np.all(np.isfinite(vlb_mean)) and np.all(np.abs(vlb_mean).max(axis=(1, 2)) > 0)
    assert np.all(np.isfinite(vlb_v)) and np.all(np.abs(vlb_v).max(axis=(1, 2)) > 0)


update, weights = jax.jit(update_history), jax.jit(importance_weights)
LEVELS = jnp.arange(1, T + 1)


def filled(losses):
    """The history of T levels after as many losses of each, (n, T)."""
    return functools.reduce(lambda history, values: update(history, LEVELS, values), losses, init_history(T))


def test_levels_are_drawn_by_their_losses_and_weighted_for_it():
    """p_t ∝ √E[L_t²] but for 0.1 % that are uniform; the weighted mean is the mean over levels, with less variance."""
    of_level = np.geomspace(0.01, 10, T)[::-1]
    history = filled(jnp.asarray(of_level * np.random.default_rng(0).uniform(0.5, 1.5, (10, T)), jnp.float32))
    root = np.sqrt((np.asarray(history.losses, np.float64) ** 2).mean(axis=1))
    expected = 0.999 * root / root.sum() + 0.001 / T
    keys = jax.random.split(KEY, 4000)
    t = np.asarray(jit(jax.vmap(lambda key: draw_by_history(history, key, 50)))(keys))
    weight = np.asarray(weights(history, LEVELS), np.float64)
    np.testing.assert_allclose(1 / (T * weight), expected, rtol=1e-4)
    counts = np.bincount(t.ravel(), minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1
    assert np.all(np.abs(counts[1:] - t.size * expected) < 5 * np.sqrt(t.size * expected))
    means = (weight * of_level)[t - 1].mean(axis=1)
    assert_mean(means, of_level.mean())
    assert (weight * of_level)[t - 1].std() < 0.5 * of_level.std()


def test_levels_are_uniform_until_each_has_ten_losses():
    losses = jnp.asarray(np.geomspace(1, 100, T) * np.ones((11, 1)), jnp.float32)
    missing = filled(losses[:9])
    missing = update(missing, jnp.where(LEVELS == 1, 2, LEVELS), losses[0])  # only level 1 lacks one
    for history in (init_history(T), filled(losses[:9]), missing):
        np.testing.assert_allclose(weights(history, LEVELS), 1, rtol=1e-5)
    for history in (update(missing, LEVELS, losses[0]), filled(losses)):
        assert weights(history, LEVELS)[0] > 10
    np.testing.assert_allclose(weights(filled(0 * losses), LEVELS), 1, rtol=1e-5)  # nothing to go by


def test_the_history_holds_the_last_ten_losses_of_each_level():
    """Batches in which a level occurs not at all, several times, or more than ten times."""
    rng, history, lists = np.random.default_rng(0), init_history(T), [[] for _ in range(T)]
    for step, value in zip(range(60), itertools.count(1), strict=False):
        t = rng.integers(1, T + 1, 24) if step % 3 else rng.choice([1, 2, 7], 24)
        losses = np.float32(value + np.arange(24) / 100)
        history = update(history, jnp.asarray(t), jnp.asarray(losses))
        for level, loss_of_image in zip(t, losses, strict=True):
            lists[level - 1] = [*lists[level - 1], loss_of_image][-10:]
        for row, count, kept in zip(*map(np.asarray, history), lists, strict=True):
            assert sorted(row[: len(kept)]) == sorted(kept) and (count >= 10) == (len(kept) == 10)


def test_the_loss_by_history_is_weighted(monkeypatch):
    history = filled(jnp.asarray(np.geomspace(1, 100, T) * np.ones((10, 1)), jnp.float32))
    own = WEIGHTINGS['vlb_importance']._replace(learned=lambda schedule, net, x0, t, eps, kind: 1.0 * t)
    monkeypatch.setitem(WEIGHTINGS, 'own', own)
    how = dict(kind='v', weighting='own', learned=True)
    found = jit(lambda history: loss(KEY, SCH, None, jnp.zeros((40, 1)), history=history, **how))(history)
    possible = weights(history, LEVELS) * LEVELS
    chosen = np.abs(found[:, None] - possible).argmin(axis=1)
    np.testing.assert_allclose(found, possible[chosen], rtol=1e-6)
    assert np.mean(chosen + 1 > 5) > 0.8


# What is refused.


def double(x_t, t):
    return jnp.concatenate([x_t, x_t], axis=-1)


def identity(x_t, t):
    return x_t


CALLS = {
    'elbo': lambda net, **how: elbo(KEY, SCH, net, jnp.zeros((2, 3)), kind='v', **how),
    'importance': lambda net, **how: importance_bound(KEY, SCH, net, jnp.zeros((2, 3)), kind='v', samples=2, **how),
    'sample': lambda net, eta=1.0, **how: sampler.sample(
        jax.random.split(KEY, 2), SCH, net, shape=(3,), timesteps=FULL, kind='v', eta=eta, **how
    ),
    'flow': lambda net, **how: flow.flow_bound(KEY, SCH, net, jnp.zeros((2, 3)), kind='v', **how),
}


@pytest.mark.parametrize('name', CALLS)
def test_the_shape_of_the_output_must_fit_the_variance(name):
    def shape(net, **how):
        return jax.eval_shape(lambda: CALLS[name](net, **how))

    shape(double, variance='learned')
    if name != 'flow':
        shape(gaussian.mean_half(double))
    with pytest.raises(ValueError, match=r"variance 'learned', or gaussian.mean_half"):
        shape(double)
    with pytest.raises(ValueError, match=r"twice as many values along the last axis.*'small' or 'large'"):
        shape(identity, variance='learned')
    with pytest.raises(ValueError, match='twice as many'):
        shape(gaussian.mean_half(identity))
    if name != 'flow':
        with pytest.raises(ValueError, match=r"'learned' belongs to eta=1, not to eta=0.5.*'small'"):
            shape(double, variance='learned', eta=0.5)


def test_a_loss_that_does_not_fit_the_variance_is_refused():
    for name in set(WEIGHTINGS) - {'vlb', 'vlb_importance', 'hybrid'}:
        with pytest.raises(
            ValueError, match=rf"{name!r} would not train the learned variance: use one of 'vlb', .*'hyb"
        ):
            loss_of(name, learned=True)
    with pytest.raises(ValueError, match=r"'hybrid' trains a variance.*'simple'.*learned=True"):
        loss_of('hybrid')
