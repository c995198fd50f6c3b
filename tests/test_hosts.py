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
from PIL import Image

from diffusion.runtime import distributed
from diffusion.runtime.interrupt import EXIT_STATUS
from tests.test_main import ROOT, assert_refused, main
from tests.test_train import flags, metrics, saved

PATIENCE = 540  # seconds for what takes a few on an idle machine
NETWORK = dict(train__batch_size=16, train__learning_rate=1e-4, mesh__fsdp=2)


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def hosts(count, devices, workdir, cache, *more, own=lambda process_id: (), environment=None, **changes):
    """`count` processes with so many devices each; ended with the block, whatever happens in it.

    own: process_id → flags of that process alone; environment: {process_id: its variables}.
    """
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
                            *own(process_id),
                        ],
                        cwd=ROOT,
                        env=os.environ
                        | {
                            'JAX_PLATFORMS': 'cpu',
                            'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} '
                            '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
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


def assert_all_refuse(workdir, *words, count=2, **how):
    """Each of the hosts says so, at once, and no run is begun."""
    with hosts(count, 1, workdir, 'off', mesh__fsdp=1, **how) as processes:
        statuses = wait(processes, workdir, patience=120)
        outputs = [said(workdir, process_id) for process_id in range(count)]
    assert statuses == [1] * count, '\n---\n'.join(outputs)
    for output in outputs:
        assert 'Traceback' not in output, output
        for word in words:
            assert word in output, output
    assert not (workdir / 'checkpoints').exists() and not (workdir / 'config.json').exists()


def test_settings_that_differ_are_named_by_all_hosts(tmp_path):
    """Of three hosts the last is asked for another seed, rate and number of steps, none of which is wrong by itself."""
    keys = ('config.seed', 'config.train.learning_rate', 'config.train.num_steps')
    here, there = ('0', '0.0001', '4'), ('1', '0.01', '5')
    both = zip(keys, here, there, strict=True)
    words = [f'{key}: process 0 has {before}, process 2 has {after}' for key, before, after in both]
    assert_all_refuse(
        tmp_path / 'run',
        'are not the same on all hosts',
        *words,
        count=3,
        own=lambda i: [f'--{key}={value}' for key, value in zip(keys, there, strict=True)] if i == 2 else (),
    )


def test_hosts_that_are_to_do_something_else_say_so(tmp_path):
    """Whatever the mode."""
    words = '--mode is not the same on all hosts', 'process 0 has sample, process 1 has likelihood'
    assert_all_refuse(tmp_path / 'run', *words, own=lambda i: [f'--mode={("sample", "likelihood")[i]}'])


def test_other_versions_are_named(tmp_path):
    metadata = tmp_path / 'other' / 'optax-0.0.1.dist-info' / 'METADATA'
    metadata.parent.mkdir(parents=True)
    metadata.write_text('Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n')
    environment = {1: {'PYTHONPATH': str(tmp_path / 'other')}}
    words = 'the version of optax is not the same on all hosts', 'process 1 has 0.0.1'
    assert_all_refuse(tmp_path / 'run', *words, environment=environment)


@pytest.mark.parametrize('missing', [False, True], ids=['one picture', 'none'])
def test_other_images_are_refused_by_all_hosts(tmp_path, missing):
    """In folders of their own, which is allowed, as are caches of their own."""
    for process_id in range(2 - missing):
        folder = tmp_path / str(process_id) / 'pictures'
        folder.mkdir(parents=True)
        for number in range(20):
            Image.new('L', (8, 8), number + process_id * (number == 19)).save(folder / f'{number}.png')
    assert_all_refuse(
        tmp_path / 'run',
        'config.data.source is not the same on all hosts',
        'process 0 has 20 images with SHA-256',
        'process 1 has config.data: there is no folder' if missing else 'process 1 has 20 images with SHA-256',
        data__source='folder:pictures',
        own=lambda i: [f'--config.data.{key}={tmp_path / str(i)}' for key in ('data_dir', 'cache_dir')],
    )


# A process that does not wait for a minute, as it takes it that hosts are started that far apart.
HASTY = (
    'import runpy, sys\n'
    'from diffusion.runtime import distributed\n'
    'distributed.SHORTEST_PATIENCE = 3\n'
    "sys.argv[0] = 'main.py'\n"
    "runpy.run_path('main.py', run_name='__main__')\n"
)


def hasty(workdir, *more, **environment):
    """(exit status, output) of one host."""
    done = subprocess.run(
        [sys.executable, '-c', HASTY, *flags(workdir), '--config.distributed.timeout=3', *more],
        cwd=ROOT,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not workdir.exists()
    return done.returncode, done.stdout + done.stderr


def assert_tries_again(found, *words):
    """One line that says what is missing, and the exit status after which launchers start it again."""
    status, output = found
    assert status == EXIT_STATUS, output
    (line,) = [line for line in output.splitlines() if line.startswith('error:')]
    for word in words:
        assert word in line, output
    assert 'Traceback' not in output and 'stack trace' not in output, output


@pytest.mark.parametrize('host', ['127.0.0.1', 'no-such-host.invalid'])
def test_a_coordinator_that_is_not_there_is_named(tmp_path, host):
    address = f'{host}:{free_port()}'
    joined = [f'--config.distributed.{key}' for key in (f'coordinator={address}', 'num_processes=2', 'process_id=1')]
    found = hasty(tmp_path / 'run', *joined)
    assert f'process 1: waiting for 2 processes at {address}' in found[1]
    assert_tries_again(found, f'config.distributed.coordinator={address}', 'process 0')


def test_a_host_that_does_not_come_is_missed(tmp_path):
    address = f'127.0.0.1:{free_port()}'
    joined = [f'--config.distributed.{key}' for key in (f'coordinator={address}', 'num_processes=2', 'process_id=0')]
    found = hasty(tmp_path / 'run', *joined)
    assert f'process 0: waiting for 2 processes at {address}' in found[1]
    assert_tries_again(found, f'config.distributed.coordinator={address}', 'config.distributed.num_processes', '3 s')


def test_a_host_that_slurm_promises_is_missed(tmp_path):
    slurm = {'JOB_ID': str(free_port()), 'STEP_NODELIST': 'localhost', 'NTASKS': '2', 'PROCID': '0', 'LOCALID': '0'}
    found = hasty(tmp_path / 'run', **{f'SLURM_{key}': value for key, value in slurm.items()})
    assert_tries_again(found, 'not met', 'config.distributed.detect=False')


def test_pods_whose_names_are_not_known_yet_try_again(tmp_path):
    """JAX asks for them within its detection, of which this stands in for the cluster's library alone."""
    folder = tmp_path / 'kubernetes'
    folder.mkdir()
    (folder / '__init__.py').write_text('from kubernetes import client, config\n')
    (folder / 'config.py').write_text('def load_incluster_config(): pass\n')
    exceptions = "exceptions = type('', (), {'ApiException': type('ApiException', (Exception,), {})})\n"
    (folder / 'client.py').write_text(f'CoreV1Api = BatchV1Api = object\n{exceptions}')
    environment = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'HOSTNAME': 'pod-0.invalid', 'PYTHONPATH': str(tmp_path)}
    assert_tries_again(hasty(tmp_path / 'run', **environment), 'do not meet', 'config.distributed.detect=False')


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (('coordinator=127.0.0.1', 'num_processes=2', 'process_id=0'), ("'127.0.0.1'", 'host:port')),
        (('coordinator=10.0.0.1:http', 'num_processes=2', 'process_id=0'), ("'10.0.0.1:http'", 'host:port')),
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
