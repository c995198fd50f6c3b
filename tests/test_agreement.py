"""What one host meets, all hosts do the same about: a real process each, with failures that only one of them has."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_hosts import free_port
from tests.test_main import ROOT


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    """What each of the two hosts of tests/two_hosts.py saw."""
    folder, port = tmp_path_factory.mktemp('shared'), free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, '-m', 'tests.two_hosts', str(port), str(process_id), str(folder)],
            cwd=ROOT,
            env=os.environ | {'JAX_PLATFORMS': 'cpu'},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process_id in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.parametrize(
    ('what', 'found'),
    [
        ('a write that failed on one host', 'OSError'),
        ('what one host could not read', [2, 2.0]),
        ('put aside', [1]),
        ('saved again', [2, 1]),
        ('folders that are not shared', 'DamagedError'),
    ],
)
def test_hosts_agree(seen, what, found):
    assert [of_host[what] for of_host in seen] == [found, found]
