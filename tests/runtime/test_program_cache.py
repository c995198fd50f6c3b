"""The folder of compiled programs."""

import os

import pytest

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


@pytest.mark.slow
def test_programs_are_kept_and_found_again(tmp_path):
    """One that was cut short, by a process that ended while it wrote, is written again: JAX would never do that."""

    def compile_with_cache():
        done = python(PROGRAM, tmp_path, HOME=str(tmp_path), JAX_PLATFORMS='cpu')
        assert (done.returncode, done.stderr) == (0, '')
        (program,) = (tmp_path / 'programs').glob('*-cache')
        return done.stdout.split(), program, program.stat().st_size

    outputs, _, size = compile_with_cache()
    assert outputs == ['0', '1']
    outputs, program, _ = compile_with_cache()
    assert outputs == ['1', '1']
    os.truncate(program, size // 2)
    assert abs(compile_with_cache()[2] - size) < 100
