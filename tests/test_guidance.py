"""Guided nets, for data whose scores are known: a mixture of two Gaussians, each of which is a class."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import build, gaussian, guidance, sampler, schedule
from diffusion.conditions import condition
from tests import oracles
from tests.jaxprs import equations
from tests.runs import tiny

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


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(SCALES, INTERVALS)
def test_the_guided_noise_is_the_gradient_of_the_sharpened_density(scale, interval):
    """In the interval of σ_t; outside it is that of the class. Levels inside and outside are in one batch."""
    sigma = np.sqrt(1 / ALPHA_BAR - 1)[LEVELS]
    inside = (interval[0] < sigma) & (sigma <= interval[1]) if interval else np.full(24, True)
    expected = DATA.eps(functools.partial(density, scale=np.where(inside, scale, 1.0)), X, LEVELS)
    found = guided(scale=scale, interval=interval)(jnp.float32(X), jnp.asarray(LEVELS))
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * (1 + scale))


def test_the_interval_has_its_upper_end_but_not_its_lower_one():
    x_t, t = jnp.float32(X), jnp.asarray(LEVELS)
    ends = tuple(float(jnp.exp(-0.5 * SCHEDULE.log_snr(jnp.asarray(level)))) for level in (10, 50))
    expected = np.where(np.isin(LEVELS, [30, 50]), guided(scale=3.0)(x_t, t), DATA.net(LABELS)(x_t, t))
    np.testing.assert_allclose(guided(scale=3.0, interval=ends)(x_t, t), expected, rtol=0, atol=1e-6)


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


# The network.


@functools.cache
def conditional():
    config = tiny({'data.labels': True, 'model.num_classes': 10, 'model.implementation': 'plain'})
    exp = build.build(config)
    return exp, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), exp.abstract_state().params)


def batches(**how):
    """(batch size, whether it is within a condition) of each convolution of a net for 6 images."""
    exp, params = conditional()
    net = condition(exp, tuple(range(10)), **how)(params, jnp.arange(6))
    jaxpr = jax.make_jaxpr(net)(jnp.zeros((6, 8, 8, 1)), jnp.ones(6, jnp.int32)).jaxpr
    found = [(e, inside) for e, inside in equations(jaxpr) if e.primitive.name == 'conv_general_dilated']
    return [(e.invars[0].aval.shape[0], 'cond' in inside) for e, inside in found]


def test_the_unconditional_half_costs_one_evaluation_of_twice_the_batch():
    """There are as many convolutions with guidance as without, each of twice as many images."""
    plain = batches()
    assert len(plain) > 4 and set(plain) == {(6, False)}
    assert batches(scale=2.0) == [(12, False)] * len(plain)
    assert batches(scale=1.0) == plain


def test_outside_the_interval_the_batch_is_evaluated_once():
    """One branch of a condition has the network with the batch, the other with twice the batch."""
    count = len(batches())
    assert sorted(batches(scale=2.0, interval=(0.3, 3.0))) == [(6, True)] * count + [(12, True)] * count


class Echo:
    """Returns the label of each image, and 100 more if its parameters are those of the guide."""

    num_classes = 3

    def net(self, params, labels=None):
        return lambda x_t, t: jnp.broadcast_to((labels + params)[:, None], x_t.shape).astype(jnp.float32)


def test_each_image_has_its_label_and_each_half_its_own():
    exp, _ = conditional()
    exp = build.Experiment(exp.schedule, Echo(), *(getattr(exp, name) for name in list(vars(exp))[2:]))
    x_t, t, numbers = jnp.zeros((5, 2)), jnp.ones(5, jnp.int32), jnp.arange(7, 12)
    labels = np.array([2, 0, 1])[np.arange(7, 12) % 3]
    echo = functools.partial(condition, exp, (2, 0, 1))
    np.testing.assert_array_equal(echo()(0, numbers)(x_t, t)[:, 1], labels)
    np.testing.assert_array_equal(echo(scale=3.0)(0, numbers)(x_t, t)[:, 0], -1 + 3 * (labels + 1))
    by_another = echo(scale=3.0, guide=exp)((0, 100), numbers)(x_t, t)
    np.testing.assert_array_equal(by_another[:, 0], labels + 100 + 3 * -100)
