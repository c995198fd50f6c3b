"""Loops that are written out, against JAX's own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.runtime.xla import fold

KERNELS = 0.1 * jax.random.normal(jax.random.key(0), (6, 3, 3, 8, 8))
IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 16, 16, 8))
KEYS = jax.random.split(jax.random.key(2), 4)


def add(total, part):
    """One more part of the gradient of a few convolutions, as accumulating parts of a batch has it."""
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


def compiled(loop, parts=4):
    program = jax.jit(lambda keys, images: loop(add, ZERO, [keys, images]))
    return program.lower(KEYS[:parts], IMAGES[:parts]).compile()


def scan(body, carry, parts):
    return jax.lax.scan(lambda carry, part: (body(carry, part), None), carry, parts)[0]


def orders(program):
    """The orders of dimensions among the convolutions of a program."""
    return set(re.findall(r'dim_labels=(\S+?->\w+)', program.as_text()))


def test_a_loop_that_is_written_out_gives_what_the_loop_gives():
    ours, theirs = (compiled(loop)(KEYS, IMAGES) for loop in (fold, scan))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='other compilers know loops')
def test_on_cpus_its_gradients_are_the_convolutions_that_eigen_has():
    assert orders(compiled(fold)) == {'b01f_01io->b01f'}
    assert len(orders(compiled(scan))) > 1  # else the loop may stay a loop


def test_one_part_is_in_memory_at_a_time():
    one, four = (compiled(fold, parts).memory_analysis().temp_size_in_bytes for parts in (1, 4))
    assert four < 1.5 * one


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_part(bad):
    """Parts wait for each other, and have nothing else in common."""
    parts = [jnp.array([bad, 1.0]), KEYS[:2]]
    drawn = fold(lambda carry, part: (part[0], jax.random.normal(part[1])), (jnp.float32(0), jnp.float32(0)), parts)
    np.testing.assert_array_equal(drawn, (1.0, jax.random.normal(KEYS[1])))
