"""Programs of the implementation for CPUs are right whatever other threads do (benchmarks/NOTES.md has the reason)."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.networks import cpu, make_rngs

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def network(image_size, channels, multipliers, attention):
    """(graph, parameters), all of them random."""
    settings = dict(image_size=image_size, image_channels=1, channels=channels, multipliers=multipliers, num_blocks=1)
    more = dict(attention_resolutions=attention, dropout=0.1, groups=8, dtype=jnp.float32)
    make = functools.partial(cpu.NETWORKS['unet'], **settings, **more)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=make_rngs(default=0))))
    draw = np.random.default_rng(0)

    def parameter(leaf):
        return jnp.float32(draw.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]) or 1))

    return graph, jax.tree.map(parameter, nnx.to_pure_dict(state))


def sampling(seed, *, images=200, steps=50):
    """A function that samples by the demo's network: many steps, each of many small operations."""
    graph, params = network(8, 32, (1, 2), (4,))

    def draw(params, key):
        net = nnx.merge(graph, params)

        def step(x, t):
            return 0.9 * x + 0.1 * jnp.tanh(net(x, jnp.full(images, t))), None

        return jax.lax.scan(step, jax.random.normal(key, (images, 8, 8, 1)), jnp.arange(steps, 0, -1))[0]

    program = cpu.compile(draw, params, jax.random.key(seed), out_shardings=HERE)
    return lambda: program(params, jax.random.key(seed))


def training(*, batch=16):
    """A function that computes the gradients of a step with large activations."""
    graph, params = network(32, 64, (1, 2, 2), (16,))
    x = jax.random.normal(jax.random.key(1), (batch, 32, 32, 1))

    def gradients(params, key):
        def loss(params):
            return (
                nnx.merge(graph, params)(x, jnp.arange(batch), deterministic=False, rngs=make_rngs(default=key)) ** 2
            ).mean()

        return jax.grad(loss)(params)

    program = cpu.compile(gradients, params, jax.random.key(2), out_shardings=HERE, largest_activation=x.size * 64)
    return lambda: program(params, jax.random.key(2))


@pytest.mark.slow
@pytest.mark.optimized  # with the options that runs have
def test_three_threads_get_what_one_gets():
    """Two samplings and a training step. With convolutions by Eigen the first images of a batch went wrong."""
    functions = [sampling(0), sampling(1), training()]
    alone = [jax.device_get(function()) for function in functions]
    for _ in range(3):
        together = [None] * len(functions)

        def work(i, together=together):
            together[i] = jax.device_get(functions[i]())

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
