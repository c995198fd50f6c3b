"""Compiler options for XLA:CPU, and loops in a form that it compiles well."""

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from diffusion.networks.cpu.conv import winograd
from diffusion.networks.cpu.order import LARGE, after
from diffusion.networks.plain import NO_OPTIONS
from diffusion.networks.program import Program, flops_of

QUICK_TO_COMPILE = {'xla_backend_optimization_level': 0}
LEAST_MEMORY = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}


def compile(
    function: Callable,
    *args: Any,
    out_shardings: Any,
    donate: Sequence[int] = (),
    largest_activation: int = 0,
    once: bool = False,
    options: Mapping[str, Any] = NO_OPTIONS,
) -> Program:
    """Compile function(*args), as `plain.compile` does.

    By default XLA:CPU starts operations as early as it can, so that they run concurrently. Small operations gain from
    this. A large one keeps all cores busy by itself, and an early result only takes memory: programs with large
    activations are therefore scheduled for the least memory. A function that is called once is compiled without
    optimization: the initial parameters of a U-Net are ready in a fifth of the time, and identical bit by bit.

    The libraries for convolutions and matrix products are those that JAX chooses. With Eigen's convolutions, results
    are wrong if two programs run at once (benchmarks/NOTES.md).
    """
    ours = QUICK_TO_COMPILE if once else LEAST_MEMORY if largest_activation > LARGE else {}
    how: Any = dict(donate_argnums=tuple(donate), out_shardings=out_shardings, compiler_options=ours | dict(options))
    traced = jax.jit(function, **how).trace(*args)
    program = Program(traced.lower().compile(), flops_of(traced.jaxpr, {'winograd': winograd}))
    _return_free_memory()
    return program


def _return_free_memory():
    """Give malloc's free memory back to Linux: after compiling a large step, it is more than a gigabyte."""
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None  # glibc has it
    if trim:
        trim(0)


def fold(body: Callable[[Any, Any], Any], carry: Any, parts: Any) -> Any:
    """Return body(… body(body(carry, part 0), part 1) …, last part), as `plain.fold` does, without a loop.

    Inside loops XLA:CPU computes the gradients of convolutions by a slow fallback. Each part, random keys included,
    waits for the part before it, so that only one part's activations are in memory.
    """
    for i in range(len(jax.tree.leaves(parts)[0])):
        done = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(carry))
        carry = body(carry, jax.tree.map(lambda x, i=i, done=done: after(done, x[i]), parts))
    return carry
