"""Several hosts: real processes on this machine, joined over its loopback and started as a user would."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from diffusion.runtime import distributed
from tests.test_main import ROOT, assert_refused, main
from tests.test_train import flags, metrics, saved

PATIENCE = 540  # seconds for what takes a few on an idle machine
NETWORK = dict(train__batch_size=16, train__learning_rate=1e-4, mesh__fsdp=2)


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def hosts(count, devices, workdir, cache, *more, **changes):
    """`count` processes with so many devices each; ended with the block, whatever happens in it."""
    port, processes = free_port(), []
    try:
        for process_id in range(count):
            joined = [
                f'--config.distributed.coordinator=127.0.0.1:{port}',
                f'--config.distributed.num_processes={count}',
                f'--config.distributed.process_id={process_id}',
            ]
            # Files, not pipes: nobody reads along, and a full pipe would stop a process.
            with open(f'{workdir}-{process_id}.log', 'w', encoding='utf-8') as log:
                processes.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            'main.py',
                            *flags(workdir, **(NETWORK | changes)),
                            f'--config.compile_cache={cache}',
                            *(joined if count > 1 else []),
                            *more,
                        ],
                        cwd=ROOT,
                        env=os.environ
                        | {
                            'JAX_PLATFORMS': 'cpu',
                            'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} '
                            '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
                        },
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def said(workdir, process_id=0):
    with open(f'{workdir}-{process_id}.log', encoding='utf-8', errors='replace') as file:
        return file.read()


def wait(processes, workdir, patience=PATIENCE):
    """Exit statuses, once all have ended."""
    deadline = time.monotonic() + patience
    try:
        return [process.wait(timeout=max(1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        outputs = '\n'.join(f'--- {i}\n{said(workdir, i)[-4000:]}' for i in range(len(processes)))
        pytest.fail(f'the processes did not end within {patience} s:\n{outputs}')


def wait_for_step(processes, workdir, step):
    """Until so many steps are logged."""
    log, deadline = workdir / 'logs' / 'metrics.jsonl', time.monotonic() + PATIENCE
    while not (log.exists() and len(log.read_text(encoding='utf-8').splitlines()) >= step):
        assert all(process.poll() is None for process in processes), said(workdir)
        assert time.monotonic() < deadline, said(workdir)
        time.sleep(0.02)


def train(count, devices, workdir, cache, **changes):
    """A run to its end. Returns what the hosts printed."""
    with hosts(count, devices, workdir, cache, **changes) as processes:
        statuses = wait(processes, workdir)
        outputs = [said(workdir, process_id) for process_id in range(count)]
        assert statuses == [0] * count, '\n---\n'.join(outputs)
    return outputs


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    """A folder in which processes share compiled programs."""
    return tmp_path_factory.mktemp('compiled')


MANY = 3000  # steps: more than are done before a signal arrives


@pytest.fixture(scope='module')
def stopped(tmp_path_factory, cache):
    """(workdir, the step it reached) of two hosts with two devices each, one of which was sent SIGTERM."""
    workdir = tmp_path_factory.mktemp('hosts') / 'run'
    with hosts(2, 2, workdir, cache, train__num_steps=MANY) as processes:
        wait_for_step(processes, workdir, 3)
        processes[1].send_signal(signal.SIGTERM)  # not the one that writes
        statuses = wait(processes, workdir)
        assert statuses == [75, 75], said(workdir) + said(workdir, 1)
    (step,) = saved(workdir)
    assert 3 <= step < MANY
    return workdir, step


def losses(workdir):
    rows = metrics(workdir)
    assert [step for step, *_ in rows] == list(range(1, len(rows) + 1))  # each step once: one host logs
    return [loss for _, loss, *_ in rows]


def copy(workdir, target):
    subprocess.run(['cp', '-r', str(workdir), str(target)], check=True)
    return target


def test_two_hosts_stop_together_and_go_on_as_one(stopped, tmp_path, cache):
    """Two processes with two devices, then one with four; against one process with one device."""
    workdir, step = stopped
    assert 'another host was asked to: stopped after step' in said(workdir)
    assert '2 hosts, 4 × cpu as data 2 × fsdp 2' in said(workdir)
    assert 'stopped' not in said(workdir, 1) and 'cpu as data' not in said(workdir, 1)  # it prints nothing
    again = copy(workdir, tmp_path / 'again')
    (output,) = train(1, 4, again, cache, train__num_steps=step + 8)
    assert f'step {step} of {step + 8}' in output
    alone = tmp_path / 'alone'
    train(1, 1, alone, cache, train__num_steps=step + 8, mesh__fsdp=1)
    np.testing.assert_allclose(losses(again), losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_two_hosts_go_on_as_four(stopped, tmp_path, cache):
    """And a grid of samples is written once, as one host does."""
    workdir, step = stopped
    ends = dict(train__num_steps=step + 8, train__sample_every=step + 8)
    four, one = copy(workdir, tmp_path / 'four'), copy(workdir, tmp_path / 'one')
    outputs = train(4, 1, four, cache, **ends)
    assert f'step {step} of {step + 8}' in outputs[0] and '4 hosts' in outputs[0]
    assert all('complete' not in output for output in outputs[1:])
    train(1, 2, one, cache, **ends)
    np.testing.assert_allclose(losses(four), losses(one), rtol=1e-5)
    pictures = [list((folder / 'samples' / 'progress').iterdir()) for folder in (four, one)]
    assert [len(files) for files in pictures] == [1, 1]
    assert len(list((four / 'logs').glob('events*'))) == len(list((workdir / 'logs').glob('events*'))) + 1


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_a_host_that_dies_ends_the_others(tmp_path, cache, killed):
    """Within the time that is set, and with words; the one that meets the others (0) or another."""
    workdir, timeout = tmp_path / 'run', 20
    with hosts(2, 1, workdir, cache, train__num_steps=10**6, distributed__timeout=timeout, mesh__fsdp=1) as processes:
        wait_for_step(processes, workdir, 3)
        processes[killed].kill()
        started = time.monotonic()
        other = processes[1 - killed]
        wait([other], workdir)
        assert time.monotonic() - started < timeout + 20
    assert other.returncode not in (0, None)
    assert any(word in said(workdir, 1 - killed) for word in ('another host has gone', 'another task died'))


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (('coordinator=127.0.0.1:1', 'num_processes=2', 'process_id=2'), ('process_id=2', 'num_processes=2')),
        (('coordinator=127.0.0.1:1', 'num_processes=2'), ('process_id=-1',)),
        (('coordinator=127.0.0.1:1',), ('num_processes=0',)),
        (('num_processes=2', 'process_id=0'), ('coordinator', 'host:port')),
        (('process_id=0',), ('coordinator', 'host:port')),
    ],
    ids=lambda value: ' '.join(value),
)
def test_settings_that_do_not_fit_are_named(tmp_path, changes, words):
    asked = [f'--config.distributed.{change}' for change in changes]
    assert_refused(main(*flags(tmp_path / 'run'), *asked), 'config.distributed', *words)
    assert not (tmp_path / 'run').exists()


def test_on_a_lone_machine_nothing_is_detected(monkeypatch):
    """And nothing printed is lost."""
    for name in os.environ:
        if name.startswith(('SLURM_', 'OMPI_', 'KUBERNETES_', 'TPU_', 'CLOUD_TPU_', 'JAX_')):
            monkeypatch.delenv(name)
    program = (
        'import sys, jax\n'
        'from diffusion.runtime import distributed\n'
        "nothing = dict(coordinator='', num_processes=0, process_id=-1, timeout=100)\n"
        'out = sys.stdout\n'
        'distributed.connect(detect=True, **nothing)\n'
        'distributed.connect(detect=False, **nothing)\n'
        'assert sys.stdout is out and jax.process_count() == 1\n'
        'assert jax.distributed.is_initialized() is False\n'
    )
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_failure_is_blamed_on_others_only_where_there_are_some(monkeypatch):
    error = TimeoutError('no word for 100 s\nmore')
    assert distributed.lost(error) is None
    monkeypatch.setattr(distributed.jax, 'process_count', lambda: 4)
    monkeypatch.setattr(distributed.jax, 'process_index', lambda: 2)
    assert 'process 2 of 4' in distributed.lost(error) and 'no word for 100 s)' in distributed.lost(error)
    assert distributed.lost(ValueError('a bug')) is None
