"""The count of operations, against closed forms."""

import jax
import jax.numpy as jnp
import pytest

from diffusion.networks.program import flops_of

X = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
KERNEL = jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)
CONVOLUTION = 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)  # a product and a sum for each output and each element of the kernel


def conv(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def count(function, *args):
    return flops_of(jax.make_jaxpr(function)(*args))


@pytest.mark.parametrize('stride', [1, 2])
def test_a_convolution_and_its_gradients_cost_the_same_each(stride):
    """So a training step costs three times its forward pass."""
    assert count(lambda x, k: conv(x, k, stride), X, KERNEL) == CONVOLUTION / stride**2
    gradient = jax.grad(lambda x, k: (conv(x, k, stride) ** 2).sum(), (0, 1))
    assert count(gradient, X, KERNEL) == 3 * CONVOLUTION / stride**2


def test_matrix_products_in_batches():
    a, b = jnp.ones((7, 4, 6)), jnp.ones((7, 6, 5))
    assert count(jnp.matmul, a, b) == 2 * 7 * 4 * 6 * 5
    assert count(jnp.dot, a[0], b[0][:, 0]) == 2 * 4 * 6


def test_loops_branches_and_recomputation():
    a = jnp.ones((4, 4))
    product = 2 * 4**3
    assert count(lambda x: jax.lax.scan(lambda x, _: (x @ a, None), x, None, length=5)[0], a) == 5 * product
    assert count(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x @ a, x), a) == 5 * product
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ a @ a, lambda x: x @ a, x), a) == 2 * product
    # Without recomputation: forward, and the gradient of one factor. Recomputed: once more.
    kept = jax.grad(lambda x: jnp.sin(x @ a).sum())
    assert count(kept, a) == 2 * product
    assert count(jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(x @ a).sum())(x)), a) == 3 * product


def test_all_devices_count_together():
    mesh = jax.sharding.AbstractMesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec('x')
    product = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert count(product, jax.ShapeDtypeStruct((8, 6), jnp.float32)) == 4 * (2 * 2 * 2 * 6)
