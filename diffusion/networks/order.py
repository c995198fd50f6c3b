"""In what order things are computed: what holds a compiler back, and changes no number."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def after(value, x):
    """x, which a compiler cannot have before it has `value`, floats of a shape that x takes.

    XLA for CPUs drops jax.lax.optimization_barrier: nothing but data holds it back. What is added to x is 0, whatever
    the value is: nothing is more than infinite, but XLA does not know.
    """
    return x + (value > jnp.inf).astype(x.dtype)


def apart(function, x):
    """function(x), computed once and by itself, its axes in memory in their order; function: of floats, gives an array.

    XLA for CPUs would compute it again in each program that uses it, number by number as they are needed there; but
    not what a condition decides on: that x is not more than infinite. Without a fixed order of axes it would compute
    nothing apart but leave an image as it lies, and turn it round in those programs.
    """
    if not x.size:
        return function(x)

    def laid_out(x):
        result = function(x)
        return with_layout_constraint(result, Layout(major_to_minor=tuple(range(result.ndim))))

    shape = jax.eval_shape(function, x)
    return jax.lax.cond(x[(0,) * x.ndim] > jnp.inf, lambda x: jnp.zeros(shape.shape, shape.dtype), laid_out, x)


def recomputed(run):
    """`run`, of which only the arguments are kept for the way back, and all else is computed again.

    As jax.checkpoint, but for the order: the second time may not start before the gradient is there, else
    a compiler that computes it early, as XLA's for CPUs, saves no memory.

    run: (x, given, fixed) → (B, …), where x are arrays (B, …) of as many axes, given all else that has a gradient, and
    fixed what has none; x alone waits. Has no derivative forwards: it is for training.
    """

    @jax.custom_vjp
    def wrapped(*args):
        return run(*args)

    def backward(args, gradient):
        x, given, fixed = args
        first = gradient[:, *(slice(1),) * (gradient.ndim - 1)]
        x = jax.tree.map(lambda leaf: after(first, leaf), x)
        _, back = jax.vjp(lambda x, given: run(x, given, fixed), x, given)
        return *back(gradient), None

    wrapped.defvjp(lambda *args: (run(*args), args), backward)
    return wrapped


def in_order(run):
    """`run`, on whose way back the gradient of x waits for that of all else.

    On a lone CPU XLA would go all the way back first, with all that the parameters' gradients need still in memory.
    Several devices would bring each other their parts of these gradients for it.

    run: as of `recomputed`. Has no derivative forwards: it is for training.
    """

    @jax.custom_vjp
    def wrapped(*args):
        return run(*args)

    def forward(x, given, fixed):
        return jax.vjp(lambda x, given: run(x, given, fixed), x, given)

    def backward(back, gradient):
        x, given = back(gradient)
        computed = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(given))
        return jax.tree.map(lambda leaf: after(computed, leaf), x), given, None

    wrapped.defvjp(forward, backward)
    return wrapped
