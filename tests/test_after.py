"""What holds a compiler back, and changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks.after import after


@pytest.mark.parametrize('value', [0.0, -3.5, np.nan, np.inf, -np.inf])
def test_after_changes_nothing(value):
    for x in (jnp.arange(3.0), jnp.arange(3), jnp.bfloat16([1, 2]), jnp.array([np.nan, np.inf])):
        found = jax.jit(after)(jnp.float32(value), x)
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(found, x)
    np.testing.assert_array_equal(jax.grad(lambda v: after(v, jnp.ones(2)).sum())(value), 0.0)


def test_after_is_in_the_program():
    program = jax.jit(after).lower(jnp.float32(0), jnp.ones(3)).compile().as_text()
    assert 'compare(' in program and 'direction=GT' in program
