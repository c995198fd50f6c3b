"""All hosts react in the same way to a failure on one of them: two real processes."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.runs import ROOT, free_port


def processes_of(number, option, program, *arguments):
    """Start `python option program port host *arguments` for the hosts from 0 to number − 1."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, option, program, *map(str, (port, process_id, *arguments))],
            cwd=ROOT,
            env=os.environ | {'JAX_PLATFORMS': 'cpu'},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process_id in range(number)
    ]


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    """What each of the two hosts of tests/runtime/two_hosts.py saw."""
    folder = tmp_path_factory.mktemp('shared')
    processes = processes_of(2, '-m', 'tests.runtime.two_hosts', folder)
    try:
        while any(process.poll() is None for process in processes):  # a host whose peer failed would wait for it
            if any(process.poll() for process in processes):
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.parametrize(
    ('what', 'found'),
    [
        ('any host', [False, False, True, False]),  # one call late, on the host that asked as well
        ('differences', {'other': 'process 0 has 0, process 1 has 1'}),
        ('a write that failed on one host', 'OSError'),
        ('a read that failed on one host', [2, 2.0]),
        ('put aside', [1]),
        ('saved again', [2, 1]),
        ('folders that are not shared', 'the hosts do not see the same checkpoints'),
        ('steps whose sum needs more than 32 bits', 'there is no intact checkpoint'),
    ],
)
def test_hosts_agree(seen, what, found):
    assert [of_host[what] for of_host in seen] == [found, found]


FAILS = """
import os, sys
from diffusion.runtime import hosts
port, process_id, failing = map(int, sys.argv[1:])
address = f'127.0.0.1:{port}'
hosts.connect(coordinator=address, num_processes=3, process_id=process_id, detect=False, timeout=100)
hosts.any_host(False)
if process_id == failing:
    hosts.end_all('out of device memory')
try:
    hosts.any_host(False)  # waits for the host that fails, and raises once it has ended
except Exception as error:
    os._exit(75 if hosts.lost(error) else 2)  # as cli.py does
"""


@pytest.mark.slow
@pytest.mark.parametrize('failing', [0, 1])
def test_a_host_that_would_fail_again_ends_all(failing):
    """With status 1, after which no launcher starts them again, whether the coordinator fails or another."""
    processes = processes_of(3, '-c', FAILS, failing)
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1, 1], outputs
    told = [f'error: process {failing}: out of device memory\n' in errors for _, errors in outputs]
    assert told == [process_id != failing for process_id in range(3)]
