"""The demo, as `make demo` runs it, and the quality of its results. It takes minutes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.digits import quality
from tests.runs import CONFIG, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.optimized]


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    run(folder)
    return folder


def run(workdir, *flags):
    command = [sys.executable, 'main.py', CONFIG, f'--workdir={workdir}', *flags]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1800)


def test_ddim_samples_are_digits_of_every_class(workdir):
    run(workdir, '--mode=sample')
    (path,) = workdir.glob('samples/step4000-*/samples.npz')
    with np.load(path) as arrays:
        images = arrays['arr_0']
    assert images.shape == (1000, 8, 8, 1)
    distance, shares = quality(images)
    assert distance <= 0.8 and shares.min() >= 0.03


def test_the_bounds_are_in_their_order(workdir):
    """ELBO ≤ IW-1 ≤ IW-2 ≤ … ≤ IW-64, on a chain of 50 steps; the transition form and IW-1 agree with the ELBO."""
    flags = {'num_images': 64, 'samples': 64, 'num_steps': 50, 'quantities': "('posterior','transition','importance')"}
    run(workdir, '--mode=likelihood', *(f'--config.likelihood.{key}={value}' for key, value in flags.items()))
    (path,) = workdir.glob('likelihood/*/ledger.json')
    rows = {row['quantity'].split(' (')[0]: row for row in json.loads(path.read_text(encoding='utf-8'))['rows']}
    elbo, transition = (rows[f'ELBO, {form} form: total'] for form in ('posterior', 'transition'))
    bounds = [rows[f'importance-weighted bound, K = {2**i}'] for i in range(7)]
    assert (
        abs(transition['nats'] - elbo['nats'])
        < 4 * (transition['standard_error'] ** 2 + elbo['standard_error'] ** 2) ** 0.5
    )
    assert abs(bounds[0]['nats'] - elbo['nats']) < 4 * bounds[0]['standard_error']
    nats = [bound['nats'] for bound in bounds]
    assert nats == sorted(nats) and nats[-1] - nats[0] > 1
    (gap,) = (row for name, row in rows.items() if name.startswith('gap'))
    assert gap['nats'] > 3 * gap['standard_error']
