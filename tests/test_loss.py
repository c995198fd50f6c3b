"""The loss against its expectation, which is known for Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion import gaussian, schedule
from diffusion.likelihood.elbo import elbo
from diffusion.loss import draw, loss, loss_at
from tests import oracles

T = 100
SCH = schedule.linear(T, 1e-3, 0.2)
ALPHA_BAR = np.array([float(a) for a in oracles.alpha_bars(oracles.betas('linear', T, 1e-3, 0.2))])


@pytest.mark.parametrize('kind', gaussian.KINDS)
def test_expectation_under_the_best_predictor(kind):
    """Var[ε|x_t] = ᾱs²/(ᾱs²+1−ᾱ); x_0 and v are ε times (√(1−ᾱ)/√ᾱ) and 1/√ᾱ, at fixed x_t. Mean over t = 1 … T."""
    data = oracles.GaussianData(0.3, 0.4, ALPHA_BAR)
    a = ALPHA_BAR[1:]
    variance = a * 0.4**2 / (a * 0.4**2 + 1 - a)
    variance = variance * {'eps': 1, 'x0': (1 - a) / a, 'v': 1 / a}[kind]
    x0 = 0.3 + 0.4 * jax.random.normal(jax.random.key(0), (40_000, 1, 1, 1))
    values = np.asarray(loss(jax.random.key(1), SCH, data.net(kind), x0, kind=kind), np.float64)
    assert values.shape == (40_000,)
    assert abs(values.mean() - variance.mean()) < 4.5 * values.std() / np.sqrt(len(values))


def test_levels_are_all_of_1_to_T_and_images_draw_their_own():
    seen = {}

    def net(x_t, t):
        seen.update(t=np.asarray(t), x_t=np.asarray(x_t, np.float64))
        return jnp.zeros_like(x_t)

    values = loss(jax.random.key(0), SCH, net, jnp.zeros((30_000, 4)), kind='eps')
    counts = np.bincount(seen['t'], minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1
    expected = 30_000 / T
    assert np.sum((counts[1:] - expected) ** 2 / expected) < T + 5 * np.sqrt(2 * T)  # χ² with T−1 degrees of freedom
    eps = seen['x_t'] / np.sqrt(1 - ALPHA_BAR[seen['t']])[:, None]
    np.testing.assert_allclose(values, (eps**2).mean(1), rtol=1e-3)  # the mean over pixels, as in DDPM, no sum
    assert np.abs(np.corrcoef(eps, rowvar=False) - np.eye(4)).max() < 5 / np.sqrt(30_000)
    assert len(np.unique(eps[:, 0])) > 29_900
    assert abs(np.mean(eps)) < 5 / np.sqrt(120_000) and abs(np.var(eps) - 1) < 5 * np.sqrt(2 / 120_000)


def test_the_key_decides():
    net = oracles.GaussianData(0.0, 1.0, ALPHA_BAR).net('eps')
    x0 = jnp.ones((8, 2, 2, 1))
    values = [loss(jax.random.key(k), SCH, net, x0, kind='eps') for k in (0, 0, 1)]
    np.testing.assert_array_equal(values[0], values[1])
    assert np.all(values[0] != values[2])


@pytest.mark.parametrize('weighting', ['simple', 'vlb'])
def test_levels_and_noise_are_drawn_apart(weighting):
    """No key serves twice, and over many keys the level says nothing of the noise."""
    program = jax.jit(lambda key: draw(key, T, (1, 3), weighting=weighting))
    with jax.debug_key_reuse(True):
        program(jax.random.key(0))
    t, eps = jax.vmap(program)(jax.random.split(jax.random.key(1), 10_000))
    correlation = np.corrcoef(np.c_[t, eps[:, 0]], rowvar=False)
    assert np.abs(correlation - np.eye(4)).max() < 5 / np.sqrt(10_000)


def test_half_precision_outputs_do_not_lower_the_precision_of_the_loss():
    x0 = jnp.full((16, 3), 0.5)
    values = loss(jax.random.key(0), SCH, lambda x, t: jnp.zeros(x.shape, jnp.bfloat16), x0, kind='x0')
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, 0.25)


def test_the_loss_of_jsd_is_finite_at_its_last_level():
    sch = schedule.jsd(2)
    for kind in gaussian.KINDS:
        values, gradient = jax.value_and_grad(
            lambda w, kind=kind: loss(jax.random.key(0), sch, lambda x, t: w * x, jnp.ones((64, 2)), kind=kind).sum()
        )(1.0)
        assert np.isfinite(values) and np.isfinite(gradient)


def test_unknown_weighting():
    with pytest.raises(ValueError, match='simple'):
        loss(jax.random.key(0), SCH, lambda x, t: x, jnp.zeros((2, 1)), kind='eps', weighting='simpel')


def test_vlb_is_minus_the_elbo_in_bits_per_dim():
    """Mean over draws of the one-term estimate, against the whole sum; within 4.5 standard errors of both."""
    data = oracles.GaussianData(0.0, 0.5, ALPHA_BAR)
    x0 = jnp.round((0.3 * jax.random.normal(jax.random.key(0), (3,)) + 1) * 127.5) / 127.5 - 1
    x0 = jnp.tile(x0, (20_000, 1))[:, :, None, None]
    one_term = jax.jit(lambda key: loss(key, SCH, data.net('eps'), x0, kind='eps', weighting='vlb'))
    values = np.asarray(one_term(jax.random.key(1)), np.float64)
    assert values.shape == (20_000,)
    terms = jax.jit(lambda key: elbo(key, SCH, data.net('eps'), x0[:400], kind='eps'))(jax.random.key(2))
    bits = -np.asarray(terms.total(), np.float64) / (3 * np.log(2))
    error = np.hypot(values.std() / np.sqrt(20_000), bits.std() / np.sqrt(400))
    assert abs(values.mean() - bits.mean()) < 4.5 * error
    assert error < 0.05 * abs(bits.mean())


def test_vlb_of_a_network_that_knows_the_image_is_prior_and_decoder():
    """All other terms are 0; with ᾱ_T = 0.3 the prior is not. Nats to bits/dim: over ln 2 and the number of pixels."""
    betas = np.array([0.1, 0.2, 0.3, 0.4])
    a = np.cumprod(np.append(1.0, 1 - betas))
    x0 = np.array([[-1, 1 / 255, 1], [0.2, -101 / 255, 1]])
    sch = schedule.from_betas(betas)
    x = jnp.asarray(x0, jnp.float32)

    @jax.jit
    def bits(t):
        eps = jax.random.normal(jax.random.key(t), x.shape)
        return loss_at(sch, lambda x_t, _: x, x, jnp.full(2, t), eps, kind='x0', weighting='vlb')

    mean, variance = np.sqrt(a[4]) * x0, 1 - a[4]
    prior = 0.5 * (variance + mean**2 - 1 - np.log(variance)).sum(1)
    for t in (2, 3, 4):
        np.testing.assert_allclose(bits(t), prior / (3 * np.log(2)), rtol=1e-5)

    std = np.sqrt((1 - a[1]) / (1 - a[2]) * betas[1])  # √β̃_2, which is Ho's at the last step as well
    upper, lower = (np.where(x0 == edge, edge * np.inf, sign / 255) for edge, sign in ((1, 1), (-1, -1)))
    probability = stats.norm.cdf(upper / std) - stats.norm.cdf(lower / std)  # of one of 256 values
    np.testing.assert_allclose(bits(1), (prior - 4 * np.log(probability).sum(1)) / (3 * np.log(2)), rtol=1e-5)


def test_vlb_draws_its_levels_evenly_over_the_batch():
    seen = []

    def net(x_t, t):
        seen.append(np.asarray(t))
        return jnp.zeros_like(x_t)

    for seed in range(10):
        loss(jax.random.key(seed), SCH, net, jnp.zeros((20, 1)), kind='eps', weighting='vlb')
    for t in seen:  # T = 100 levels, 20 images: one of each 5, up to where the circle begins
        assert set(np.diff(np.sort(t))) <= {4, 5, 6} and t.min() >= 1 and t.max() <= T
    assert len(np.unique(np.concatenate(seen))) > 60


def test_vlb_has_finite_gradients_at_every_level():
    def total(w, kind):
        sch = schedule.linear(10, 1e-3, 0.3)
        x0 = jnp.tile(jnp.array([-1.0, 0.003921628, 1.0]), (64, 1))
        return loss(jax.random.key(0), sch, lambda x, t: w * x, x0, kind=kind, weighting='vlb').mean()

    for kind in gaussian.KINDS:
        value, gradient = jax.jit(jax.value_and_grad(total), static_argnums=1)(0.5, kind)
        assert np.isfinite(value) and np.isfinite(gradient) and gradient != 0
