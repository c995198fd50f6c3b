"""JAX's own switches: JAX_ENABLE_X64, JAX_DEBUG_NANS and JAX_DISABLE_JIT change no dtype and break nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import gaussian, sampler, schedule
from diffusion.likelihood.elbo import FORMS, elbo
from diffusion.likelihood.flow import flow_bound
from diffusion.likelihood.importance import importance_bound
from diffusion.loss import WEIGHTINGS, init_history, loss, update_history
from tests.runs import flags, main

SCH = schedule.linear(4, 0.1, 0.5)
KEY = jax.random.key(0)
X0 = np.linspace(-1, 1, 40, dtype=np.float32).reshape(2, 20)  # beyond the 16 values for which the flow's trace is exact
SWITCHES = ('JAX_ENABLE_X64', 'JAX_DEBUG_NANS', 'JAX_DISABLE_JIT')


def net(x_t, t):
    return 0.5 * x_t


def learned(x_t, t):
    return jnp.concatenate([0.5 * x_t, 0.1 * x_t], axis=-1)


def sample(eta, net=net, rule='kernel', **how):
    keys = jax.random.split(KEY, 2)
    return sampler.sample(keys, SCH, net, shape=(20,), timesteps=[4, 2, 0], kind='eps', eta=eta, rule=rule, **how)


CALLS = {
    **{
        f'loss {name}': lambda name=name: loss(KEY, SCH, net, X0, kind='v', weighting=name)
        for name in WEIGHTINGS
        if name != 'hybrid'
    },
    'loss hybrid': lambda: loss(KEY, SCH, learned, X0, kind='v', weighting='hybrid', learned=True),
    'loss by history': lambda: loss(
        KEY, SCH, learned, X0, kind='v', weighting='vlb_importance', learned=True, history=init_history(4)
    ),
    'history': lambda: update_history(init_history(4), jnp.array([1, 1]), jnp.ones(2, jnp.float32)).losses,
    **{f'elbo {name}': lambda name=name: elbo(KEY, SCH, net, X0, kind='v', form=name, eta=0.5) for name in FORMS},
    'one term': lambda: elbo(KEY, SCH, net, X0, kind='eps', levels=1).standard_error(),
    **{f'sample {eta}': lambda eta=eta: sample(eta) for eta in (0.0, 0.5, 1.0, np.float64(0.5))},
    'sample large': lambda: sample(1.0, variance='large'),
    'sample learned': lambda: sample(1.0, learned, variance='learned'),
    'sample variances': lambda: sample(0.5, variance=np.array([0.5, 0.1])),
    'importance': lambda: importance_bound(KEY, SCH, net, X0, kind='x0', samples=2),
    'predict': lambda: [gaussian.predict(SCH, kind, X0, X0, 3) for kind in gaussian.KINDS],
    'schedule': lambda: [
        (s.noise(t), s.snr(t), s.log_snr(t)) for s in (SCH, schedule.jsd(4)) for t in (0, 2.5, 3.0, 4.0)
    ],
}
FLOW = {'flow': lambda: flow_bound(KEY, SCH, net, X0, kind='v')}


@pytest.mark.parametrize('name', CALLS | FLOW)
def test_every_result_is_float32_whatever_the_default_is(name):
    with jax.enable_x64(True):
        found = jax.eval_shape((CALLS | FLOW)[name])
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} <= {jnp.float32, jnp.dtype('float32')}
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, jax.eval_shape((CALLS | FLOW)[name]))


@pytest.mark.parametrize(
    'name', [name if name in ('predict', 'schedule') else pytest.param(name, marks=pytest.mark.slow) for name in CALLS]
)
def test_results_without_nan_pass_the_search_for_nan(name):
    """Operation by operation, where the constants are seen as well that we fill in."""
    with jax.debug_nans(True), jax.disable_jit():
        CALLS[name]()


@pytest.mark.slow
@pytest.mark.parametrize('switch', SWITCHES)
def test_a_run_is_trained_sampled_and_measured(tmp_path, switch):
    config = '--config=tests/two_layers.py'
    how = dict(
        sample__num_images=2,
        sample__num_steps=4,
        likelihood__num_images=2,
        likelihood__batch_size=2,
        likelihood__samples=2,
    )
    for mode in ('train', 'sample', 'likelihood'):
        done = main(*flags(tmp_path, config, **how), f'--mode={mode}', **{switch: '1'})
        assert done.returncode == 0, done.stderr
