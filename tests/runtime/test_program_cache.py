"""The folder of compiled programs."""

from tests.runtime.common import python

PROGRAM = """
import os, sys
import jax
from diffusion.runtime import compilation

compilation.MIN_SECONDS = 0
jax.jit(lambda x: x + 1)(1.0)  # JAX decides here that there is no cache
compilation.cache_programs('~/programs')
before = sorted(os.listdir(sys.argv[1]))
jax.jit(lambda x: x * x)(2.0)
print(len(before), len([name for name in os.listdir(sys.argv[1] + '/programs') if name.endswith('cache')]))
"""


def test_programs_are_kept_and_found_again(tmp_path):
    done = [python(PROGRAM, tmp_path, HOME=str(tmp_path), JAX_PLATFORMS='cpu') for _ in range(2)]
    assert [run.stdout.split() for run in done] == [['0', '1'], ['1', '1']], [run.stderr for run in done]
