"""What XLA is told of every program (benchmarks/NOTES.md has the figures)."""

import ctypes
import math
import sys

import jax
import jax.numpy as jnp


def compiler_options(largest_kept=0):
    """Of jax.jit. largest_kept: numbers in the largest activation that is kept for the way back; 0 without any.

    On CPUs sums and matrix products go to YNNPACK, as they do by themselves, but convolutions to Eigen: of YNNPACK's,
    those with fewer than 128 outputs keep one core busy. And XLA begins early what could run beside other things, which
    is good for small programs. Of large ones each operation keeps all cores busy, and what was begun early waits in
    memory: they are ordered for the least memory, and their matrix products are Eigen's, too.

    Several CPU devices get what JAX has by itself, convolutions by YNNPACK: those of Eigen can be wrong there. While
    each thread of XLA's pool is busy with a program, what they leave in its queues stays; after 1,024 pieces the pool
    does at once what it is asked to do later, and Eigen then packs the next part of an image over one still in use.
    """
    if jax.default_backend() != 'cpu' or jax.device_count() > 1:
        return {}
    if largest_kept > 2**19:
        return {
            'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE',
            'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED',
        }
    return {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE'}


def compiled(function, *args, out_shardings, largest_kept=0, donate=()):
    """The program of function(*args); those args whose numbers are in `donate` lend it their buffers for its results.

    On Linux free memory is given back to the system: malloc would keep what compiling took, more than a gigabyte.
    """
    options = compiler_options(largest_kept)
    jitted = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings, compiler_options=options)
    program = jitted.lower(*args).compile()
    if sys.platform == 'linux':
        trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # that of glibc
        if trim:
            trim(0)
    return program


def fold(body, carry, parts):
    """body(… body(carry, part 0) …, last part), as of a loop. parts: arrays with the parts as their first axis.

    On CPUs the loop is written out: within loops XLA does not compute gradients of convolutions by Eigen, and takes 25
    times as long. No part begins before the last has ended, nor are its random numbers drawn: else what several need
    would be in memory at a time.
    """
    if not _written_out():
        return jax.lax.scan(lambda carry, part: (body(carry, part), None), carry, parts)[0]
    for i in range(len(jax.tree.leaves(parts)[0])):
        ended = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(carry))
        carry = body(carry, [_after(ended, x[i]) for x in parts])
    return carry


def operations(program, parts=1):
    """Floating-point operations of a compiled program on each device; NaN where XLA does not count them.

    parts: of a `fold` that most of the program is: of a loop XLA counts one turn.
    """
    counted = (program.cost_analysis() or {}).get('flops', math.nan)
    return counted if _written_out() else counted * parts


def _written_out():
    return jax.default_backend() == 'cpu'


def _after(value, x):
    """x, numbers or random keys, which a compiler cannot have before it has `value`, a float.

    XLA for CPUs drops jax.lax.optimization_barrier. What is added is 0: nothing is more than infinite.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_after(value, jax.random.key_data(x)), impl=jax.random.key_impl(x))
    return x + (value > jnp.inf).astype(x.dtype)
