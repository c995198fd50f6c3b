"""The plain implementation: networks as the papers write them, compiled by JAX with its own options."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from diffusion.networks.program import Program, flops_of

NETWORKS: dict[str, type[nnx.Module]] = {}  # entries that replace those of networks.NETWORKS

NO_OPTIONS: Mapping[str, Any] = types.MappingProxyType({})


def compile(
    function: Callable,
    *args: Any,
    out_shardings: Any,
    donate: Sequence[int] = (),
    largest_activation: int = 0,
    once: bool = False,
    options: Mapping[str, Any] = NO_OPTIONS,
) -> Program:
    """Compile function(*args).

    Args:
        function: takes and returns pytrees of arrays.
        *args: arrays, or their shapes and shardings.
        out_shardings: shardings of the results, see `jax.jit`.
        donate: positions of the arguments whose buffers the results may reuse.
        largest_activation: elements of the largest activation that the backward pass needs, on each device; 0 if there
            is no backward pass. Not used here.
        once: whether the function is called only once, so that compiling it takes longer than running it. Not used
            here.
        options: options of XLA, by name.

    Returns:
        The compiled function.
    """
    how: Any = dict(donate_argnums=tuple(donate), out_shardings=out_shardings, compiler_options=dict(options))
    traced = jax.jit(function, **how).trace(*args)
    return Program(traced.lower().compile(), flops_of(traced.jaxpr))


def fold(body: Callable[[Any, Any], Any], carry: Any, parts: Any) -> Any:
    """Return body(… body(body(carry, part 0), part 1) …, last part).

    Args:
        body: (carry, part) -> the next carry.
        carry: a pytree of arrays.
        parts: a pytree of arrays; their first axis counts the parts.
    """
    return jax.lax.scan(lambda carry, part: (body(carry, part), None), carry, parts)[0]


def pack(tree: Any, like: Any, parts: int = 1) -> Any:
    """Return a training state in the form that a training step takes: as it is.

    Args:
        tree: the training state.
        like: its parameters.
        parts: among how many devices it is divided.
    """
    return tree


def unpack(tree: Any) -> Any:
    """Return the tree that `pack` was given."""
    return tree
