"""XLA flags for tests: programs compile in a third of the time, and run slowly."""

import importlib.metadata
import json
import re

FAST_TO_COMPILE = (
    '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
    '--xla_cpu_parallel_codegen_split_count=1'
)
FUSED = {}  # compiler options for what looks at fusions, or at rounding that depends on them
if int(importlib.metadata.version('jaxlib').split('.')[1]) < 12:  # a process ends if it does not know a flag
    FAST_TO_COMPILE += ' --xla_cpu_use_fusion_emitters=false'
    FUSED = {'xla_cpu_use_fusion_emitters': True}

# Compiler options of a program that takes seconds to run: half optimized, it is through sooner.
LONG = {'xla_backend_optimization_level': 1}

# FAST_TO_COMPILE as compiler options.
QUICK = {name: json.loads(value) for name, value in re.findall(r'--(\w+)=(\w+)', FAST_TO_COMPILE)}
