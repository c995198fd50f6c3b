"""What XLA is told of every program (benchmarks/NOTES.md has the figures)."""

import jax


def compiler_options(largest_kept=0):
    """Of jax.jit. largest_kept: numbers in the largest activation that is kept for the way back; 0 without any.

    On CPUs sums and matrix products go to YNNPACK, as they do by themselves, but convolutions to Eigen: of YNNPACK's,
    those with fewer than 128 outputs keep one core busy. And XLA begins early what could run beside other things, which
    is good for small programs. Of large ones each operation keeps all cores busy, and what was begun early waits in
    memory: they are ordered for the least memory.
    """
    if jax.default_backend() != 'cpu':
        return {}
    options = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE'}
    if largest_kept > 2**19:
        options['xla_cpu_scheduler_type'] = 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'
    return options
