"""What the implementations compile: the options, loops, and the count of operations."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks import IMPLEMENTATIONS, NETWORKS, cpu, gpu, plain

KERNELS = 0.1 * jax.random.normal(jax.random.key(0), (6, 3, 3, 8, 8))
IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 16, 16, 8))
KEYS = jax.random.split(jax.random.key(2), 4)
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def add(total, part):
    """One more part of the gradient of a few convolutions, as when a step accumulates the parts of a batch."""
    key, x = part

    def mean(kernels):
        h = x
        for kernel in kernels:
            h = jnp.sin(jax.lax.conv_general_dilated(h, kernel, (1, 1), 'SAME', dimension_numbers=ORDER))
        return (h * jax.random.normal(key, h.shape)).mean()

    value, gradient = jax.value_and_grad(mean)(KERNELS)
    return total[0] + value, total[1] + gradient


ORDER = ('NHWC', 'HWIO', 'NHWC')
ZERO = jnp.float32(0), jnp.zeros_like(KERNELS)


@pytest.fixture(scope='module')
def programs():
    """{implementation: the sum over four parts}."""
    return {
        name: implementation.compile(
            lambda keys, images, fold=implementation.fold: fold(add, ZERO, [keys, images]),
            KEYS,
            IMAGES,
            out_shardings=HERE,
        )
        for name, implementation in IMPLEMENTATIONS.items()
    }


def test_implementations_fold_to_the_same(programs):
    first, *others = (program(KEYS, IMAGES) for program in programs.values())
    for a, b in zip(len(others) * first, sum(others, ()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='other compilers know loops')
def test_cpus_have_no_loop_around_gradients_of_convolutions(programs):
    """XLA:CPU computes them by a slow fallback there, which shows in the order of their dimensions."""
    texts = {name: program.compiled.as_text() for name, program in programs.items()}
    orders = {name: set(re.findall(r'dim_labels=(\S+?->\w+)', text)) for name, text in texts.items()}
    assert orders['cpu'] == {'b01f_01io->b01f'}
    assert len(orders['plain']) > 1  # else `fold` could be a loop


def test_one_part_is_in_memory_at_a_time(programs):
    one = cpu.compile(lambda keys, x: cpu.fold(add, ZERO, [keys, x]), KEYS[:1], IMAGES[:1], out_shardings=HERE)
    all_parts, one_part = (program.compiled.memory_analysis() for program in (programs['cpu'], one))
    assert all_parts.temp_size_in_bytes < 1.5 * one_part.temp_size_in_bytes


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_values_that_are_not_finite_stay_in_their_part(bad):
    parts = [jnp.array([bad, 1.0]), KEYS[:2]]
    drawn = cpu.fold(lambda carry, part: (part[0], jax.random.normal(part[1])), (jnp.float32(0), jnp.float32(0)), parts)
    np.testing.assert_array_equal(drawn, (1.0, jax.random.normal(KEYS[1])))


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_operations_of_a_fold_are_those_of_its_parts(name):
    """A matrix product of n×n matrices takes 2n³."""
    implementation, n, parts = IMPLEMENTATIONS[name], 64, 5
    xs = jnp.ones((parts, n, n))
    program = implementation.compile(
        lambda xs: implementation.fold(lambda total, x: total @ x, jnp.eye(n), xs), xs, out_shardings=HERE
    )
    assert program.flops == parts * 2 * n**3


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_donated_buffers_are_reused(name):
    x = jnp.zeros(1000)
    program = IMPLEMENTATIONS[name].compile(lambda x: x + 1, x, out_shardings=HERE, donate=(0,), largest_activation=10)
    np.testing.assert_array_equal(program(x), 1)
    assert x.is_deleted() and program.compiled.memory_analysis().alias_size_in_bytes == x.nbytes


def test_implementations_replace_networks_by_subclasses():
    """Which have the same parameters, unless they override the constructor, and are called in the same way."""
    assert plain.NETWORKS == {}
    for name, network in [*cpu.NETWORKS.items(), *gpu.NETWORKS.items()]:
        assert issubclass(network, NETWORKS[name])
        assert inspect.unwrap(network.__init__) is NETWORKS[name].__init__
        own, plain_ones = (list(inspect.signature(cls.__call__).parameters) for cls in (network, NETWORKS[name]))
        assert own == plain_ones
