"""Parameters as one vector: what goes in comes out, derivatives pass through, and the optimizer does the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.networks.gpu import pack, unpack
from diffusion.networks.gpu.packing import Packed

DRAW = np.random.default_rng(0)
TREE = {
    'kernel': DRAW.normal(size=(3, 3, 5, 7)).astype(np.float32),
    'matrix': {'a': DRAW.normal(size=(4, 6)).astype(np.float32), 'b': DRAW.normal(size=129).astype(np.float32)},
    'one': DRAW.normal(size=(1,)).astype(np.float32),
}


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)


@pytest.mark.parametrize('parts', [1, 3, 8])
def test_what_is_packed_comes_out_again(parts):
    """Every subtree like the parameters is one vector, which divides evenly; all else stays."""
    state = {'step': np.int32(3), 'params': TREE, 'moments': (TREE, np.float32(0))}
    packed = pack(state, TREE, parts)
    assert isinstance(packed['params'], Packed) and isinstance(packed['moments'][0], Packed)
    assert [leaf.ndim for leaf in jax.tree.leaves(packed)] == [1, 0, 1, 0]
    assert packed['params'].vector.size % parts == 0
    equal(jax.device_get(unpack(packed)), state)


def test_derivatives_pass_through_in_both_modes():
    """The gradient of a packed tree is the packed gradient, and so is a derivative in one direction."""
    packed, direction = pack(TREE, TREE), pack(jax.tree.map(np.cos, TREE), TREE)

    def f(tree):
        return sum((leaf**3).sum() for leaf in jax.tree.leaves(tree))

    equal(unpack(jax.grad(lambda packed: f(unpack(packed)))(packed)), jax.grad(f)(TREE))
    moved = jax.jvp(lambda packed: f(unpack(packed)), (packed,), (direction,))[1]
    np.testing.assert_allclose(moved, jax.jvp(f, (TREE,), (unpack(direction),))[1], rtol=1e-5)


def test_an_optimizer_does_the_same_to_either():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    gradient = jax.tree.map(lambda leaf: np.sin(9 * leaf), TREE)

    def step(params, gradient):
        updates, state = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates), state

    expected, found = step(TREE, gradient), unpack(step(pack(TREE, TREE), pack(gradient, TREE)))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_a_convolution_kernel_lies_as_libraries_read_it():
    """Output channels first, then height, width and input channels."""
    vector = pack(TREE, TREE).vector
    np.testing.assert_array_equal(vector[: 3 * 3 * 5 * 7].reshape(7, 3, 3, 5), jnp.moveaxis(TREE['kernel'], -1, 0))
