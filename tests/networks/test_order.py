"""Data dependences that change XLA's order and no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks.cpu import order
from diffusion.networks.cpu.order import after, apart, in_order, recomputed


@pytest.mark.parametrize('value', [0.0, -3.5, np.nan, np.inf, -np.inf])
def test_after_changes_nothing(value):
    arrays = [jnp.arange(3.0), jnp.arange(3), jnp.bfloat16([1, 2]), jnp.array([np.nan, np.inf])]
    found = jax.jit(lambda value, xs: [after(value, x) for x in xs])(jnp.float32(value), arrays)
    for one, x in zip(found, arrays, strict=True):
        assert one.dtype == x.dtype
        np.testing.assert_array_equal(one, x)
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(jax.random.key_data(after(jnp.float32(value), keys)), jax.random.key_data(keys))
    np.testing.assert_array_equal(jax.grad(lambda v: after(v, jnp.ones(2)).sum())(value), 0.0)


def test_after_is_in_the_program():
    program = jax.jit(after).lower(jnp.float32(0), jnp.ones(3)).compile().as_text()
    assert 'compare(' in program and 'direction=GT' in program


@pytest.mark.parametrize('first', [0.0, np.nan, np.inf, -np.inf])
def test_apart_changes_nothing(first):
    """It has derivatives in both modes, and can be vectorized."""
    x, dx = jnp.arange(6.0).reshape(2, 3).at[0, 0].set(first), jnp.ones((2, 3))

    def results(f):
        several = jnp.stack([x, -x])
        return f(x), jax.jvp(f, (x,), (dx,)), jax.vjp(f, x)[1](dx.T), jax.vmap(f)(several), f(x[:0])

    def function(x):
        return jnp.sin(x).T

    found, expected = (jax.jit(results, static_argnums=0)(f) for f in (lambda x: apart(function, x), function))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def run(x, given, fixed):
    """Σ sin xᵢ + 10·given₀ + 100·given₁: every argument has another gradient."""
    return sum(jnp.sin(leaf) for leaf in x) + sum(factor * leaf for factor, leaf in zip((10, 100), given, strict=True))


@pytest.mark.parametrize('rule', [recomputed, in_order])
def test_gradients_are_the_same(rule):
    """Fixed arguments may be keys, integers or None."""

    def dropped(x, given, fixed):
        key, bits, nothing = fixed
        assert nothing is None
        return run(x, given, fixed) * jax.random.bernoulli(key, 0.5, (2, 3)) * bits

    x, given = [jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))], [jnp.full((2, 3), 2.0), jnp.ones(3)]
    fixed = jax.random.key(0), jnp.arange(6, dtype=jnp.uint8).reshape(2, 3), None

    def value_and_gradients(function):
        return jax.jit(jax.value_and_grad(lambda *args: (function(*args, fixed) ** 2).sum(), (0, 1)))(x, given)

    jax.tree.map(np.testing.assert_array_equal, *map(value_and_gradients, (rule(dropped), dropped)))


def test_in_order_the_gradient_of_x_waits_for_those_of_the_parameters(monkeypatch):
    """What it waits for is added to it here: the gradient of each parameter."""
    monkeypatch.setattr(order, 'after', lambda value, x: value + x)
    x, ones = jnp.zeros((2, 1)), jnp.ones((2, 1))

    def gradient(rule):
        return jax.grad(lambda x: rule(run)([x], [ones] * 2, None).sum())(x)

    np.testing.assert_array_equal(gradient(in_order), 111)
    np.testing.assert_array_equal(gradient(lambda run: run), 1)


def test_recomputation_waits_for_the_gradient(monkeypatch):
    """Each image for its own gradient, which is added to it here."""
    monkeypatch.setattr(order, 'after', lambda value, x: value + x)
    gradient = jnp.array([[2.0], [3.0]])
    _, vjp = jax.vjp(lambda x: recomputed(run)([x], [0.0, 0.0], None), jnp.zeros((2, 1)))
    np.testing.assert_allclose(vjp(gradient)[0], gradient * np.cos(gradient), rtol=1e-6)


def test_recomputation_keeps_only_the_arguments():
    x = jnp.ones((2, 3))
    kept = jax.tree.leaves(jax.vjp(lambda x: recomputed(lambda *args: jnp.exp(run(*args)))([x], [x, x], None), x)[1])
    assert kept and all(leaf is x or np.array_equal(leaf, x) for leaf in kept)
