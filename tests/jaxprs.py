"""Reads the operations of a traced function from its jaxpr."""

import jax


def equations(jaxpr, inside=()):
    """(equation, names of the primitives around it) for all equations of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation, inside
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, 'eqns')):
            inner = getattr(parameter, 'jaxpr', parameter)
            if hasattr(inner, 'eqns'):
                yield from equations(inner, (*inside, equation.primitive.name))
