"""Several hosts of a run: processes on this machine, started as a user would start them."""

import contextlib
import os
import subprocess
import sys
import time

import pytest

from tests.runs import CONFIG, ROOT, flags, free_port
from tests.xla_flags import FAST_TO_COMPILE

PATIENCE = 540  # seconds for what takes a few on an idle machine


@contextlib.contextmanager
def hosts(count, devices, workdir, *more, config=CONFIG, own=lambda process_id: (), environment=None, **changes):
    """Processes of a tiny run, which end with the context, whatever happens in it.

    Args:
        count: number of processes.
        devices: CPU devices of each.
        workdir: of the run; what process i prints goes to the file <workdir>-<i>.log.
        more: flags of all processes.
        config: the flag that names the config.
        own: process_id → flags of that process alone.
        environment: {process_id: variables of that process alone}.
        changes: see `tests.runs.flags`.
    """
    address, processes, given = f'127.0.0.1:{free_port()}', [], flags(workdir, config, **changes)
    try:
        for process_id in range(count):
            joined = joins(address, count, process_id) if count > 1 else []
            # Files, not pipes: nothing reads them yet, and a full pipe would block a process.
            with open(f'{workdir}-{process_id}.log', 'w', encoding='utf-8') as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, 'main.py', *given, *joined, *more, *own(process_id)],
                        cwd=ROOT,
                        env=os.environ
                        | {
                            'JAX_PLATFORMS': 'cpu',
                            'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} {FAST_TO_COMPILE}',
                        }
                        | (environment or {}).get(process_id, {}),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def joins(address, count, process_id):
    """The flags with which one of `count` processes joins the others."""
    settings = {'coordinator': address, 'num_processes': count, 'process_id': process_id}
    return [f'--config.distributed.{key}={value}' for key, value in settings.items()]


def printed(workdir, process_id=0):
    """What a process of `hosts` has printed so far."""
    with open(f'{workdir}-{process_id}.log', encoding='utf-8', errors='replace') as file:
        return file.read()


def wait(processes, workdir, patience=PATIENCE):
    """Return the exit statuses once all processes have ended."""
    deadline = time.monotonic() + patience
    try:
        return [process.wait(timeout=max(1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        outputs = '\n'.join(f'--- {i}\n{printed(workdir, i)[-4000:]}' for i in range(len(processes)))
        pytest.fail(f'the processes did not end within {patience} s:\n{outputs}')
