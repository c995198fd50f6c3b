"""The loss against its expectation, which is known for Gaussian data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion import gaussian, schedule
from diffusion.likelihood.elbo import elbo
from diffusion.loss import WEIGHTINGS, Weighting, draw, loss
from tests import oracles
from tests.likelihood_oracles import QUICK

T = 100
SCH = schedule.linear(T, 1e-3, 0.2)
ALPHA_BAR = np.array([float(a) for a in oracles.alpha_bars(oracles.betas('linear', T, 1e-3, 0.2))])
jit = functools.partial(jax.jit, compiler_options=QUICK)


@functools.cache
def optimal_losses():
    """The loss of every kind of optimal network for data N(0.3, 0.4²), all from the same draws."""
    data = oracles.GaussianData(0.3, 0.4, ALPHA_BAR)
    x0 = 0.3 + 0.4 * jax.random.normal(jax.random.key(0), (40_000, 1, 1, 1))
    key = jax.random.key(1)
    return jit(lambda x0: {kind: loss(key, SCH, data.net(kind), x0, kind=kind) for kind in gaussian.KINDS})(x0)


@pytest.mark.parametrize('kind', gaussian.KINDS)
def test_expectation_under_the_optimal_predictor(kind):
    """Var[ε|x_t] = ᾱs²/(ᾱs²+1−ᾱ); at fixed x_t, x_0 and v are ε times √(1−ᾱ)/√ᾱ and 1/√ᾱ. Mean over t = 1 … T."""
    a = ALPHA_BAR[1:]
    variance = a * 0.4**2 / (a * 0.4**2 + 1 - a)
    variance = variance * {'eps': 1, 'x0': (1 - a) / a, 'v': 1 / a}[kind]
    values = np.asarray(optimal_losses()[kind], np.float64)
    assert values.shape == (40_000,)
    assert abs(values.mean() - variance.mean()) < 4.5 * values.std() / np.sqrt(len(values))


def test_levels_are_all_of_1_to_T_and_images_draw_their_own():
    @jit
    def program(x0):
        seen = []

        def net(x_t, t):
            seen.extend((x_t, t))
            return jnp.zeros_like(x_t)

        return loss(jax.random.key(0), SCH, net, x0, kind='eps'), *seen

    values, x_t, t = (np.asarray(array) for array in program(jnp.zeros((30_000, 4))))
    counts = np.bincount(t, minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1
    expected = 30_000 / T
    assert np.sum((counts[1:] - expected) ** 2 / expected) < T + 5 * np.sqrt(2 * T)  # χ² with T−1 degrees of freedom
    eps = x_t.astype(np.float64) / np.sqrt(1 - ALPHA_BAR[t])[:, None]
    np.testing.assert_allclose(values, (eps**2).mean(1), rtol=1e-3)  # the mean over pixels, as in DDPM, not the sum
    assert np.abs(np.corrcoef(eps, rowvar=False) - np.eye(4)).max() < 5 / np.sqrt(30_000)
    assert len(np.unique(eps[:, 0])) > 29_900
    assert abs(np.mean(eps)) < 5 / np.sqrt(120_000) and abs(np.var(eps) - 1) < 5 * np.sqrt(2 / 120_000)


def test_the_key_decides():
    net = oracles.GaussianData(0.0, 1.0, ALPHA_BAR).net('eps')
    x0 = jnp.ones((8, 2, 2, 1))
    program = jit(lambda key: loss(key, SCH, net, x0, kind='eps'))
    values = [program(jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(values[0], values[1])
    assert np.all(values[0] != values[2])


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_levels_and_noise_are_drawn_apart(weighting):
    """No key is used twice, and over many keys level and noise are uncorrelated."""
    program = jit(jax.vmap(lambda key: draw(key, SCH, (1, 3), weighting=weighting)))
    keys = jax.random.split(jax.random.key(1), 10_000)
    with jax.debug_key_reuse(True):
        t, eps = program(keys)
    correlation = np.corrcoef(np.c_[t, eps[:, 0]], rowvar=False)
    assert np.abs(correlation - np.eye(4)).max() < 5 / np.sqrt(10_000)


def test_half_precision_outputs_do_not_lower_the_precision_of_the_loss():
    def zero(x, t):
        return jnp.zeros(x.shape, jnp.bfloat16)

    values = jit(lambda x0: loss(jax.random.key(0), SCH, zero, x0, kind='x0'))(jnp.full((16, 3), 0.5))
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, 0.25)


def test_the_loss_of_jsd_is_finite_at_its_last_level():
    @jax.value_and_grad
    def total(w, kind):
        return loss(jax.random.key(0), schedule.jsd(2), lambda x, t: w * x, jnp.ones((64, 2)), kind=kind).sum()

    assert np.all(np.isfinite(jit(lambda w: [total(w, kind) for kind in gaussian.KINDS])(1.0)))


def test_unknown_weighting():
    with pytest.raises(ValueError, match='simple'):
        loss(jax.random.key(0), SCH, lambda x, t: x, jnp.zeros((2, 1)), kind='eps', weighting='simpel')


def test_a_weighting_added_to_the_table(monkeypatch):
    """Levels of its own, and a loss that returns them."""
    last = Weighting(
        lambda key, sch, batch_size: jnp.full(batch_size, sch.T), lambda schedule, net, x0, t, eps, kind: 2 * t
    )
    monkeypatch.setitem(WEIGHTINGS, 'last', last)
    values = loss(jax.random.key(0), SCH, None, jnp.zeros((3, 1)), kind='eps', weighting='last')
    np.testing.assert_array_equal(values, 3 * [2 * T])


SIGMA = np.sqrt((1 - ALPHA_BAR[1:]) / ALPHA_BAR[1:])  # of x_t/√ᾱ_t
# {weighting: (its weight of ‖x_0 − x̂_0‖², its unnormalized density of λ = −2·ln σ, or None if levels are uniform)}
WEIGHTS = {
    'snr': (SIGMA**-2, None),
    'truncated_snr': (np.where(SIGMA > 1, 1, SIGMA**-2), None),
    'min_snr': (np.where(SIGMA**-2 < 5, SIGMA**-2, 5), None),
    'p2': (1 / (1 + SIGMA**2), None),
    'sigmoid': (SIGMA**-2, lambda lam: np.exp(2) / (np.exp(2) + np.exp(lam))),
    'edm': ((SIGMA**2 + 0.5**2) / (SIGMA * 0.5) ** 2, lambda lam: stats.norm.pdf(-lam / 2, -1.2, 1.2)),
}


@pytest.mark.parametrize('weighting', WEIGHTS)
def test_weightings_are_weighted_elbos(weighting):
    """The mean over draws is the integral over levels; the optimal network's E‖x_0 − x̂_0‖² is known for Gaussian data.

    Every kind of network with the same x̂_0 has the same loss.
    """
    weight, density = WEIGHTS[weighting]
    lam = -2 * np.log(SIGMA)
    edges = np.concatenate([lam[:1], (lam[1:] + lam[:-1]) / 2, lam[-1:]])
    probability = np.full(T, 1 / T) if density is None else density(lam) * (edges[:-1] - edges[1:])
    probability = probability / probability.sum()
    data = oracles.GaussianData(0.3, 0.4, ALPHA_BAR)
    a = ALPHA_BAR[1:]
    variance = 0.4**2 * (1 - a) / (a * 0.4**2 + 1 - a)
    x0 = 0.3 + 0.4 * jax.random.normal(jax.random.key(0), (40_000, 1))
    losses = jit(
        lambda x0: [
            loss(jax.random.key(1), SCH, data.net(kind), x0, kind=kind, weighting=weighting) for kind in gaussian.KINDS
        ]
    )(x0)
    values = np.asarray(losses[0], np.float64)
    assert abs(values.mean() - (probability * weight * variance).sum()) < 4.5 * values.std() / np.sqrt(len(values))
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('weighting', ['sigmoid', 'edm'])
def test_levels_of_a_density_have_its_quantiles(weighting):
    """On a schedule of many levels, the λ drawn lie where the density, cut off at the schedule's ends, has them."""
    sch = schedule.linear(4000, 2.5e-5, 5e-3)
    t = WEIGHTINGS[weighting].levels(jax.random.key(0), sch, 10_000)
    log_snr = np.sort(np.asarray(sch.log_snr(t), np.float64))
    ends = np.asarray(sch.log_snr(np.array([4000, 1])), np.float64)
    grid = np.linspace(*ends, 100_001)
    cdf = np.cumsum(WEIGHTS[weighting][1](grid))
    expected = np.interp((np.arange(10_000) + 0.5) / 10_000, cdf / cdf[-1], grid)
    inner = slice(100, -100)
    np.testing.assert_allclose(log_snr[inner], expected[inner], atol=0.1)  # λ of neighbouring levels differ by as much


@pytest.mark.parametrize('weighting', ['sigmoid', 'edm'])
def test_a_level_without_signal_has_no_share_of_a_density(weighting):
    t = WEIGHTINGS[weighting].levels(jax.random.key(0), schedule.jsd(10), 1000)
    assert set(np.unique(t)) <= set(range(1, 10)) and len(np.unique(t)) > 5


def test_vlb_is_minus_the_elbo_in_bits_per_dim():
    """Mean over draws of the one-term estimate, against the whole sum; within 4.5 standard errors of both."""
    data = oracles.GaussianData(0.0, 0.5, ALPHA_BAR)
    x0 = jnp.round((0.3 * jax.random.normal(jax.random.key(0), (3,)) + 1) * 127.5) / 127.5 - 1
    x0 = jnp.tile(x0, (20_000, 1))[:, :, None, None]
    one_term = jit(lambda key, sch: loss(key, sch, data.net('eps'), x0, kind='eps', weighting='vlb'))
    values = np.asarray(one_term(jax.random.key(1), SCH), np.float64)
    assert values.shape == (20_000,)
    terms = jit(lambda key, sch: elbo(key, sch, data.net('eps'), x0[:400], kind='eps'))(jax.random.key(2), SCH)
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

    @jit
    def bits(t):
        eps = jax.random.normal(jax.random.key(t), x.shape)
        return WEIGHTINGS['vlb'].loss(sch, lambda x_t, _: x, x, jnp.full(2, t), eps, 'x0')

    mean, variance = np.sqrt(a[4]) * x0, 1 - a[4]
    prior = 0.5 * (variance + mean**2 - 1 - np.log(variance)).sum(1)
    for t in (2, 3, 4):
        np.testing.assert_allclose(bits(t), prior / (3 * np.log(2)), rtol=1e-5)

    std = np.sqrt((1 - a[1]) / (1 - a[2]) * betas[1])  # √β̃_2, which Ho's code uses at the last step as well
    upper, lower = (np.where(x0 == edge, edge * np.inf, sign / 255) for edge, sign in ((1, 1), (-1, -1)))
    probability = stats.norm.cdf(upper / std) - stats.norm.cdf(lower / std)  # of one of 256 values
    np.testing.assert_allclose(bits(1), (prior - 4 * np.log(probability).sum(1)) / (3 * np.log(2)), rtol=1e-5)


def test_vlb_draws_its_levels_evenly_over_the_batch():
    @jit
    @jax.vmap
    def levels_seen(key):
        seen = []

        def net(x_t, t):
            seen.append(t)
            return jnp.zeros_like(x_t)

        loss(key, SCH, net, jnp.zeros((20, 1)), kind='eps', weighting='vlb')
        return seen[0]

    seen = np.asarray(levels_seen(jax.random.split(jax.random.key(0), 10)))
    for t in seen:  # T = 100 levels, 20 images: one of each 5, except where the circle closes
        assert set(np.diff(np.sort(t))) <= {4, 5, 6} and t.min() >= 1 and t.max() <= T
    assert len(np.unique(seen)) > 60


def test_vlb_has_finite_gradients_at_every_level():
    @functools.partial(jit, static_argnums=2)
    @jax.value_and_grad
    def total(w, sch, kind):
        x0 = jnp.tile(jnp.array([-1.0, 0.003921628, 1.0]), (64, 1))
        return loss(jax.random.key(0), sch, lambda x, t: w * x, x0, kind=kind, weighting='vlb').mean()

    for kind in gaussian.KINDS:
        value, gradient = total(0.5, schedule.linear(10, 1e-3, 0.3), kind)
        assert np.isfinite(value) and np.isfinite(gradient) and gradient != 0
