"""A run that starts under one version of Python and JAX and resumes under another, that of OTHER_PYTHON."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.runs import ROOT, flags, metrics

OTHER = os.environ.get('OTHER_PYTHON')
pytestmark = pytest.mark.skipif(not OTHER, reason='OTHER_PYTHON is not set')


def train(python, workdir, steps):
    command = [python, 'main.py', *flags(workdir, train__num_steps=steps)]
    env = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}  # the other XLA has other flags
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def jax_version(python):
    program = 'import jax; print(jax.__version__)'
    return subprocess.run([python, '-c', program], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize('first_is_other', [False, True])
def test_a_run_resumes_under_another_version(tmp_path, first_is_other):
    first, second = (OTHER, sys.executable) if first_is_other else (sys.executable, OTHER)
    assert jax_version(first).split('.')[:2] != jax_version(second).split('.')[:2]
    train(first, tmp_path / 'alone', 8)
    train(first, tmp_path / 'both', 4)
    assert 'step 4 of 8' in train(second, tmp_path / 'both', 8)
    np.testing.assert_allclose(metrics(tmp_path / 'both'), metrics(tmp_path / 'alone'), rtol=1e-4)
