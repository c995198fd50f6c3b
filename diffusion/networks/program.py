"""Compiled functions, and the number of floating-point operations that they do."""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function. It is called as the function is."""

    compiled: jax.stages.Compiled
    flops: float  # operations of its convolutions and matrix products, on all devices together

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)


def flops_of(jaxpr: ClosedJaxpr, primitives: Mapping[str, Callable] = types.MappingProxyType({})) -> float:
    """Return the operations of the convolutions and matrix products of a traced function, on all devices together.

    A multiplication and an addition are two. The body of a loop counts as often as it runs, if that is known, and
    recomputation counts as well. Compiled programs cannot be asked: on GPUs, XLA counts no convolution.

    Args:
        jaxpr: of the function.
        primitives: {name of a primitive of ours: function that computes the same}.
    """
    return _flops(jaxpr.jaxpr, 1, primitives)


def _flops(jaxpr: Jaxpr, devices: int, primitives: Mapping[str, Callable]) -> float:
    return sum(_flops_of_equation(equation, devices, primitives) for equation in jaxpr.eqns)


def _flops_of_equation(equation: JaxprEqn, devices: int, primitives: Mapping[str, Callable]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        left = equation.invars[0].aval.shape  # type: ignore[attr-defined]
        return 2.0 * devices * _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)
    if name == 'conv_general_dilated':
        kernel: Any = equation.invars[1].aval.shape  # type: ignore[attr-defined]
        out = params['dimension_numbers'].rhs_spec[0]
        # Zeros between the elements of a dilated input, as in the gradient of a strided convolution, are not computed.
        products = math.prod(kernel) / kernel[out] / math.prod(params['lhs_dilation'])
        return 2.0 * devices * _size(equation.outvars[0]) * products
    if name == 'shard_map':  # shapes within it are those of one device
        devices *= params['mesh'].size
    if name in primitives:
        function = functools.partial(primitives[name], **params)
        return _flops(jax.make_jaxpr(function)(*(x.aval for x in equation.invars)).jaxpr, devices, primitives)
    inner = [_flops(inside, devices, primitives) for inside in _inside(params)]
    if name == 'cond':
        return max(inner)
    return sum(inner) * params.get('length', 1)  # only a scan has a length


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _inside(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Yield the functions that an operation calls."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            inner: Any = getattr(part, 'jaxpr', part)
            if hasattr(inner, 'eqns'):
                yield inner
