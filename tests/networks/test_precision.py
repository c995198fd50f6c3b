"""Parameters that are rounded once, against layers that round them themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import build
from tests.jaxprs import equations
from tests.runs import random_params, tiny


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_outputs_are_those_of_layers_that_round(dtype):
    config = tiny({'model.dtype': dtype, 'model.attention_resolutions': (8,), 'model.implementation': 'plain'})
    network, params = build.build(config).network, random_params(config, 0)
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([1, 3])
    # With a key, parameters are those of training; the dropout rate is 0.
    trained = network.net(params, dropout_key=jax.random.key(0))(x, t)
    np.testing.assert_array_equal(network.net(params)(x, t), trained)


def test_a_loop_rounds_no_parameter():
    config = tiny({'model.dtype': 'bfloat16'})
    network, params = build.build(config).network, random_params(config, 0)

    def chain(params, x):
        net = network.net(params)
        return jax.lax.scan(lambda x, t: (net(x, t[None]), None), x, jnp.arange(1, 4))[0]

    jaxpr = jax.make_jaxpr(chain)(params, jnp.zeros((1, 8, 8, 1))).jaxpr
    rounded = [
        equation.invars[0].aval.shape
        for equation, inside in equations(jaxpr)
        if 'scan' in inside and equation.primitive.name == 'convert_element_type'
    ]
    kernels = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim >= 2]
    assert rounded and kernels and not set(rounded) & set(kernels)
