"""What every function of the paper refuses to compute with: outputs and images that would be broadcast or misread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import gaussian, sampler, schedule
from diffusion.likelihood.elbo import FORMS, elbo
from diffusion.likelihood.flow import flow_bound
from diffusion.likelihood.importance import importance_bound
from diffusion.loss import WEIGHTINGS, loss

SCH = schedule.linear(4, 0.1, 0.5)
KEY = jax.random.key(0)
CALLS = {
    **{
        f'loss {name}': lambda net, x0, name=name: loss(KEY, SCH, net, x0, kind='eps', weighting=name)
        for name, weighting in WEIGHTINGS.items()
        if weighting.loss
    },
    **{
        f'elbo {name}': lambda net, x0, name=name: elbo(KEY, SCH, net, x0, kind='v', form=name).total()
        for name in FORMS
    },
    'importance': lambda net, x0: importance_bound(KEY, SCH, net, x0, kind='x0', samples=2),
    'flow': lambda net, x0: flow_bound(KEY, SCH, net, x0, kind='v'),
}


def sampled(net, x0):
    how = dict(shape=x0.shape[1:], timesteps=[4, 2, 0], kind='eps', eta=0.5)
    return sampler.sample(jax.random.split(KEY, len(x0)), SCH, net, **how)


WRONG = {
    '(B, 1) for (B,)': ((3,), lambda x_t, t: x_t[:, None]),
    'one channel for three': ((3, 2, 2, 3), lambda x_t, t: x_t[..., :1]),
    'three channels for one': ((3, 2, 2, 1), lambda x_t, t: jnp.repeat(x_t, 3, axis=-1)),
    'one value an image': ((3, 2, 2, 3), lambda x_t, t: x_t.mean(axis=(1, 2, 3), keepdims=True)),
    'no batch': ((3, 2), lambda x_t, t: x_t[0]),
    'a number': ((3, 2), lambda x_t, t: 0.0),
}


@pytest.mark.parametrize('name', [*CALLS, 'sample'])
def test_an_output_of_another_shape_is_refused(name):
    call = CALLS.get(name, sampled)
    jax.eval_shape(lambda: call(lambda x_t, t: x_t, jnp.zeros((3, 2, 2, 1))))  # the right shape is accepted
    for shape, net in WRONG.values():
        with pytest.raises(ValueError, match=r'the network returns the shape .* one value for each value of x_t'):
            jax.eval_shape(lambda shape=shape, net=net: call(net, jnp.zeros(shape)))


@pytest.mark.parametrize('name', CALLS)
def test_whole_numbers_are_no_images(name):
    """Seen in a compiled program as well, whatever the numbers are."""
    with pytest.raises(ValueError, match=r'x0 is uint8, but must be real numbers in \[−1, 1\].*u/127.5 − 1'):
        jax.eval_shape(lambda x0: CALLS[name](lambda x_t, t: x_t, x0), jnp.zeros((2, 3), jnp.uint8))


@pytest.mark.parametrize('name', CALLS)
@pytest.mark.parametrize('value', [255.0, np.nan])
def test_images_outside_their_range_are_refused_where_that_can_be_seen(name, value):
    x0 = np.array([[0, 0.5, -1], [1, 0, value]], np.float32)
    with pytest.raises(ValueError, match=r'x0 goes from .* but must lie in \[−1, 1\]'):
        jax.eval_shape(lambda: CALLS[name](lambda x_t, t: x_t, x0))


@pytest.mark.parametrize(('value', 'fits'), [(1.0, True), (-1.0, True), (1.01, False), (-1.5, False), (-np.inf, False)])
def test_the_range_of_images(value, fits):
    x0 = np.array([0.5, value], np.float32)
    if fits:
        gaussian.require_images(x0)
    else:
        with pytest.raises(ValueError, match=f'{value:g}'):
            gaussian.require_images(x0)


def test_the_flow_bound_looks_at_the_images_before_it_solves():
    x0 = np.array([[0, 0.5, -1], [1, 0, np.nan]], np.float32)
    with pytest.raises(ValueError, match='x0 goes from nan'):
        flow_bound(KEY, SCH, lambda x_t, t: x_t, x0, kind='v')


@pytest.mark.parametrize('kind', gaussian.KINDS)
def test_outputs_and_noise_of_another_shape_are_refused(kind):
    x0, one = jnp.zeros((3, 2, 2, 3)), jnp.zeros((3, 2, 2, 1))
    for x, y in ((x0, one), (one, x0)):
        with pytest.raises(ValueError, match=r'eps has the shape .* but x0 has'):
            gaussian.target(SCH, kind, x, 2, y)
        with pytest.raises(ValueError, match=r'output has the shape .* but x_t has'):
            gaussian.predict(SCH, kind, y, x, 2)
        with pytest.raises(ValueError, match=r'eps has the shape .* but x0 has'):
            gaussian.posterior(SCH, gaussian.Prediction(x, y), 1, 2, eta=1.0)


def test_noise_and_levels_fit_the_images():
    x0 = jnp.zeros((3, 2, 2, 1))
    with pytest.raises(ValueError, match=r'eps has the shape \(3, 2, 2, 3\), but x0 has \(3, 2, 2, 1\)'):
        gaussian.q_sample(SCH, x0, 2, jnp.zeros((3, 2, 2, 3)))
    with pytest.raises(ValueError, match=r'levels of the shape \(4,\) for images of the shape \(3, 2, 2, 1\)'):
        gaussian.q_sample(SCH, x0, jnp.arange(4), x0)
