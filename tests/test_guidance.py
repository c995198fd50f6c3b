"""Guided nets, for data whose scores are known: a mixture of two Gaussians, each of which is a class."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import gaussian, guidance, sampler, schedule
from tests import oracles

T = 100
ALPHA_BAR = np.cumprod(np.concatenate([[1.0], 1 - np.linspace(1e-3, 0.15, T)]))
SCHEDULE = schedule.linear(T, 1e-3, 0.15)
DATA = oracles.Mixture((-0.6, 0.5), 0.2, ALPHA_BAR)
X = np.linspace(-2, 2, 24)
LEVELS = np.resize([1, 10, 30, 50, 80, T], 24)
LABELS = np.resize([0, 1], 24)
SCALES = st.floats(0, 8, allow_nan=False)
INTERVALS = st.just(()) | st.tuples(st.floats(0, 3), st.floats(0.01, 30)).map(lambda ends: (ends[0], sum(ends)))


def guided(labels=LABELS, **how):
    """Classifier-free guidance with the exact nets, both halves of the batch in one call."""
    both = np.stack([labels, np.full_like(labels, -1)], axis=1).ravel()
    return guidance.guided(SCHEDULE, DATA.net(labels), guidance.halves(DATA.net(both)), **how)


def density(x, t, scale):
    """log p_t(x)^(1−w)·p_t(x | class)^w, whose gradient guides, for the classes of LABELS."""
    of_class = np.where(LABELS == 0, DATA.log_density(x, t, 0), DATA.log_density(x, t, 1))
    return (1 - scale) * DATA.log_density(x, t) + scale * of_class


@settings(max_examples=20, deadline=None)
@given(SCALES, INTERVALS)
def test_the_guided_noise_is_the_gradient_of_the_sharpened_density(scale, interval):
    """In the interval of σ_t; outside it is that of the class. Levels inside and outside are in one batch."""
    sigma = np.sqrt(1 / ALPHA_BAR - 1)[LEVELS]
    inside = (interval[0] < sigma) & (sigma <= interval[1]) if interval else np.full(24, True)
    expected = DATA.eps(functools.partial(density, scale=np.where(inside, scale, 1.0)), X, LEVELS)
    found = guided(scale=scale, interval=interval)(jnp.float32(X), jnp.asarray(LEVELS))
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * (1 + scale))


@pytest.mark.parametrize('kind', ['x0', 'v'])
def test_outputs_of_any_kind_are_guided_alike(kind):
    x_t, t = jnp.float32(X), jnp.asarray(LEVELS)

    def converted(net):
        def of_kind(x_t, t):
            x0, eps = gaussian.predict(SCHEDULE, 'eps', net(x_t, t), x_t, t)
            return gaussian.target(SCHEDULE, kind, x0, t, eps)

        return of_kind

    net, weak = DATA.net(LABELS), DATA.net(np.full_like(LABELS, -1))
    pair = converted(net), converted(weak)
    output = guidance.guided(SCHEDULE, pair[0], lambda x, t: (pair[0](x, t), pair[1](x, t)), scale=2.5)(x_t, t)
    found = gaussian.predict(SCHEDULE, kind, output, x_t, t).eps
    np.testing.assert_allclose(found, guided(scale=2.5)(x_t, t), rtol=0, atol=2e-4)


def test_images_of_a_class_come_from_its_density():
    """DDIM with the exact nets; guided samples are farther from the other class."""
    labels = np.resize([0, 1], 4000)
    how = dict(shape=(), timesteps=schedule.timesteps(T, 50), kind='eps', eta=0.0, clip=False)
    keys = jax.random.split(jax.random.key(0), len(labels))
    plain, strong = (sampler.sample(keys, SCHEDULE, guided(labels, scale=w), **how) for w in (1, 3))
    for label, mean in enumerate(DATA.means):
        mine = np.asarray(plain)[labels == label]
        assert mine.mean() == pytest.approx(mean, abs=0.03) and mine.std() == pytest.approx(DATA.std, abs=0.03)
        assert (np.asarray(strong)[labels == label].mean() - mean) * np.sign(mean) > 0.02


def test_scale_1_is_the_net_itself():
    net = DATA.net(LABELS)
    assert guidance.guided(SCHEDULE, net, None, scale=1.0, interval=(0.1, 3.0)) is net
