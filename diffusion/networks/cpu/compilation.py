"""How XLA:CPU compiles programs, and loops that it compiles well."""

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from diffusion.networks.cpu.order import LARGE, after

QUICK_TO_COMPILE = {'xla_backend_optimization_level': 0}
LEAST_MEMORY = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}


def compile(
    function: Callable,
    *args: Any,
    out_shardings: Any,
    donate: Sequence[int] = (),
    largest_activation: int = 0,
    once: bool = False,
) -> jax.stages.Compiled:
    """Compile function(*args), as `plain.compile` does.

    XLA:CPU starts operations early if they can run at the same time as others, which is good for small ones. Each of
    the large ones keeps all cores busy, and what was started early waits in memory: so they are ordered for the least
    memory. Convolutions and matrix products stay where JAX puts them, because others of its libraries are wrong if two
    programs run at once (benchmarks/NOTES.md). What is called once is compiled without optimization: initial parameters
    of a U-Net are ready in a fifth of the time, and the same bit by bit.
    """
    options = QUICK_TO_COMPILE if once else LEAST_MEMORY if largest_activation > LARGE else {}
    jitted = jax.jit(function, donate_argnums=tuple(donate), out_shardings=out_shardings, compiler_options=options)
    program = jitted.lower(*args).compile()
    _return_free_memory()
    return program


def _return_free_memory():
    """Give malloc's free memory back to Linux: after compiling a large step, it is more than a gigabyte."""
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None  # glibc has it
    if trim:
        trim(0)


def fold(body: Callable[[Any, Any], Any], carry: Any, parts: Any) -> Any:
    """Return body(… body(body(carry, part 0), part 1) …, last part), as `plain.fold` does, without a loop.

    Within loops XLA:CPU computes the gradients of convolutions by a slow fallback. Every part, random keys included,
    waits for the one before, so that only one part's activations are in memory.
    """
    for i in range(len(jax.tree.leaves(parts)[0])):
        done = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(carry))
        carry = body(carry, jax.tree.map(lambda x, i=i, done=done: after(done, x[i]), parts))
    return carry


def flops(program: jax.stages.Compiled, parts: int = 1) -> float:
    """Return the floating-point operations of a compiled program on each device, as `plain.flops` does."""
    return (program.cost_analysis() or {}).get('flops', math.nan)  # a `fold` is no loop here
