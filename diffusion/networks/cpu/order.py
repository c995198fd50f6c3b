"""The order in which XLA:CPU computes, imposed by data dependences that change no number.

XLA:CPU drops jax.lax.optimization_barrier. It cannot drop a data dependence.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

LARGE = 2**19  # elements; recomputing a larger activation is faster than fetching it from memory


def after(value: Array, x: Array) -> Array:
    """Return x with a data dependence on `value`, so that XLA computes `value` first.

    It adds (value > ∞) to x. That is always 0, but XLA does not know it.

    Args:
        value: floats, of a shape that broadcasts against x.
        x: numbers; or random keys, if `value` is a scalar.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(after(value, jax.random.key_data(x)), impl=jax.random.key_impl(x))
    return x + (value > jnp.inf).astype(x.dtype)


def apart(function: Callable[[Array], Array], x: Array) -> Array:
    """Return function(x), computed once and stored in row-major order.

    XLA:CPU would fuse the function into every consumer and recompute it there, one element at a time; a `cond` prevents
    that. Without the layout XLA would copy x inside the `cond` and transpose it in every consumer.

    Args:
        function: maps one array of floats to another.
        x: floats.
    """
    if not x.size:
        return function(x)

    def row_major(x):
        result = function(x)
        return with_layout_constraint(result, Layout(major_to_minor=tuple(range(result.ndim))))

    shape = jax.eval_shape(function, x)
    return jax.lax.cond(x[(0,) * x.ndim] > jnp.inf, lambda x: jnp.zeros(shape.shape, shape.dtype), row_major, x)


def recomputed(run: Callable) -> Callable:
    """Return `run` with a backward pass that keeps the arguments and recomputes everything else.

    It differs from jax.checkpoint in the order: the recomputation waits for the output's gradient. XLA:CPU would start
    that of jax.checkpoint early and save no memory. The returned function has no forward-mode derivatives.

    Args:
        run: a function (x, given, fixed) → (B, …). x is a pytree of arrays (B, …) with as many axes as the result;
            `given` holds the other differentiable arguments, `fixed` the rest. Only x waits.
    """

    @jax.custom_vjp
    def wrapped(*args):
        return run(*args)

    def backward(args, gradient):
        x, given, fixed = args
        first = gradient[:, *(slice(1),) * (gradient.ndim - 1)]
        x = jax.tree.map(lambda leaf: after(first, leaf), x)
        _, vjp = jax.vjp(lambda x, given: run(x, given, fixed), x, given)
        return *vjp(gradient), None

    wrapped.defvjp(lambda *args: (run(*args), args), backward)
    return wrapped


def in_order(run: Callable) -> Callable:
    """Return `run` with a backward pass that computes x's gradient after the parameters'.

    XLA:CPU would first compute the gradients of x through all blocks, and meanwhile keep in memory what the parameters'
    gradients need. The returned function has no forward-mode derivatives.

    Args:
        run: see `recomputed`.
    """

    @jax.custom_vjp
    def wrapped(*args):
        return run(*args)

    def forward(x, given, fixed):
        return jax.vjp(lambda x, given: run(x, given, fixed), x, given)

    def backward(vjp, gradient):
        x, given = vjp(gradient)
        computed = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(given))
        return jax.tree.map(lambda leaf: after(computed, leaf), x), given, None

    wrapped.defvjp(forward, backward)
    return wrapped
