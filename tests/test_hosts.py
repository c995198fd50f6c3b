"""Several hosts: processes on this machine that are joined over its loopback, and started as a user would."""

import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from diffusion import build
from diffusion.runtime import hosts as our_hosts
from diffusion.runtime import mesh
from diffusion.runtime.interrupt import EXIT_STATUS
from diffusion.util import RunError
from tests.galleries import encoded, noise
from tests.runs import (
    QUICK,
    ROOT,
    assert_refused,
    flags,
    free_port,
    main,
    make_run,
    metrics,
    quick,
    random_params,
    saved,
    tiny,
)
from tests.several_hosts import PATIENCE, hosts, joins, printed, wait

# Two layers, so wide that their kernels of 3·3·128 elements are split.
RUN = dict(config=QUICK, model__channels=128, train__learning_rate=1e-4, mesh__fsdp=2)
assert mesh.MIN_SIZE_TO_SPLIT <= 3 * 3 * 128
MANY = 3000  # steps: more than are done before a signal arrives


@pytest.fixture(scope='module')
def aside():
    """Threads for what runs beside the test that asks for it; each mostly waits for processes."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        yield pool


# ── A run on several hosts ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    """(workdir, the step it reached) of two hosts with two devices each, one of which was sent SIGTERM."""
    workdir = tmp_path_factory.mktemp('hosts') / 'run'
    with hosts(2, 2, workdir, train__num_steps=MANY, compile_cache=workdir.parent / 'compiled', **RUN) as processes:
        wait_for_step(processes, workdir, 3)
        processes[1].send_signal(signal.SIGTERM)  # not the one that writes
        statuses = wait(processes, workdir)
        assert statuses == [75, 75], printed(workdir) + printed(workdir, 1)
    (step,) = saved(workdir)
    assert 3 <= step < MANY
    return workdir, step


def wait_for_step(processes, workdir, step):
    """Return once so many steps are logged."""
    log, deadline = workdir / 'logs' / 'metrics.jsonl', time.monotonic() + PATIENCE
    while not (log.exists() and len(log.read_text(encoding='utf-8').splitlines()) >= step):
        assert all(process.poll() is None for process in processes), printed(workdir)
        assert time.monotonic() < deadline, printed(workdir)
        time.sleep(0.02)


def train(count, devices, workdir, **changes):
    """Do a run to its end. Returns what the hosts printed."""
    with hosts(count, devices, workdir, **(RUN | changes)) as processes:
        statuses = wait(processes, workdir)
        outputs = [printed(workdir, process_id) for process_id in range(count)]
        assert statuses == [0] * count, '\n---\n'.join(outputs)
    return outputs


def losses(workdir):
    rows = metrics(workdir)
    assert [step for step, *_ in rows] == list(range(1, len(rows) + 1))  # each step once: one host logs
    return [loss for _, loss, *_ in rows]


def copy(workdir, target):
    subprocess.run(['cp', '-r', str(workdir), str(target)], check=True)
    return target


@pytest.mark.slow
def test_two_hosts_stop_together_and_resume_as_one(stopped, tmp_path, aside):
    """Two processes with two devices, then one with four; compared with one process with one device."""
    workdir, step = stopped
    assert 'a signal to another host: stopped after step' in printed(workdir)
    assert '2 hosts, 4 × cpu as data 2 × fsdp 2' in printed(workdir)
    assert 'stopped' not in printed(workdir, 1) and 'cpu as data' not in printed(workdir, 1)  # it prints nothing
    alone = tmp_path / 'alone'
    on_one_device = aside.submit(train, 1, 1, alone, train__num_steps=step + 8, mesh__fsdp=1)
    again = copy(workdir, tmp_path / 'again')
    (output,) = train(1, 4, again, train__num_steps=step + 8)
    assert f'step {step} of {step + 8}' in output
    on_one_device.result()
    np.testing.assert_allclose(losses(again), losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_two_hosts_resume_as_four(stopped, tmp_path, aside):
    """A sheet of samples is written once, as one host writes it."""
    workdir, step = stopped
    ends = dict(train__num_steps=step + 8, train__sample_every=step + 8)
    four, one = copy(workdir, tmp_path / 'four'), copy(workdir, tmp_path / 'one')
    on_one = aside.submit(train, 1, 2, one, **ends)
    outputs = train(4, 1, four, **ends)
    assert f'step {step} of {step + 8}' in outputs[0] and '4 hosts' in outputs[0]
    assert all('complete' not in output for output in outputs[1:])
    on_one.result()
    np.testing.assert_allclose(losses(four), losses(one), rtol=1e-5)
    pictures = [list((folder / 'samples' / 'progress').iterdir()) for folder in (four, one)]
    assert [len(files) for files in pictures] == [1, 1]
    assert len(list((four / 'logs').glob('events*'))) == len(list((workdir / 'logs').glob('events*'))) + 1


@pytest.mark.slow
def test_hosts_that_decode_only_their_own_images_train_as_one(tmp_path, aside):
    """Two hosts begin, and three continue, which do not divide the four shards.

    The second host's copies of the pictures have other times of modification.
    """
    one, several = tmp_path / 'one', tmp_path / 'several'
    pictures = [folder_of_pictures(tmp_path / str(host)) for host in range(3)]
    for picture in pictures[1].iterdir():
        os.utime(picture, (1, 1))
    changes = dict(data__source='folder:pictures', data__shards=4, data__labels=False, mesh__fsdp=1)
    changes |= dict(train__batch_size=24, train__num_steps=8)
    own = [[f'--config.data.{key}={tmp_path / str(host)}' for key in ('data_dir', 'cache_dir')] for host in range(3)]
    on_one = aside.submit(train, 1, 2, one, own=lambda _: [*own[0], f'--config.data.cache_dir={tmp_path}'], **changes)

    def kept():
        """The sizes of the decoded shards of each host."""
        files = [(tmp_path / str(host)).glob('*/images.bin') for host in range(3)]
        return [[file.stat().st_size for file in of_host] for of_host in files]

    (output, _) = train(2, 1, several, own=own.__getitem__, **(changes | dict(train__num_steps=4)))
    assert '40 images of folder:pictures' in output
    assert kept() == [[10 * 8 * 8] * count for count in (2, 2, 0)]  # the shards 0 and 1, 2 and 3
    (output, *_) = train(3, 1, several, own=own.__getitem__, **changes)
    assert 'step 4 of 8' in output and '3 hosts' in output
    assert kept() == [[10 * 8 * 8] * count for count in (2, 3, 2)]  # 0 and 1; 1 and 2; 2 and 3
    on_one.result()
    np.testing.assert_allclose(losses(several), losses(one), rtol=1e-5)
    recorded = [json.loads((workdir / 'config.json').read_text())['images'] for workdir in (one, several)]
    assert recorded[0] == recorded[1] and recorded[0]['count'] == 40


def folder_of_pictures(folder):
    """Return a folder `pictures` in `folder`, with 40 pictures of noise."""
    (folder / 'pictures').mkdir(parents=True)
    for number, image in enumerate(noise(40, 8, 8)):
        Image.fromarray(image).save(folder / 'pictures' / f'{number:02d}.png')
    return folder / 'pictures'


@pytest.mark.slow
def test_evaluation_by_two_hosts_is_that_of_one(tmp_path, aside):
    """Images that each draws, and their metrics; metrics of images in a file; all against a reference of their own."""
    config = quick()
    params = random_params(config, 1)
    run = make_run(tmp_path / 'run', config, 5, params=params, ema=params)
    np.savez(tmp_path / 'digits.npz', build.load_images(config)[:50])
    asked = {
        'sample__num_images': 11,
        'sample__batch_size': 8,
        'sample__metrics': ('FD-pixels', 'KD-pixels'),
        'metrics__batch_size': 7,
        'sweep__num_steps': (1, 3),
        'sweep__etas': (0.0, 1.0),
        'evaluate__images': tmp_path / 'digits.npz',
    }

    def measured(count):
        workdir = copy(run, tmp_path / str(count))
        for mode in ('sweep', 'evaluate'):
            cache = {'data__cache_dir': tmp_path / f'cache of {count}'}
            with hosts(count, 2 // count, workdir, f'--mode={mode}', config=QUICK, **asked, **cache) as processes:
                statuses = wait(processes, workdir)
                assert statuses == [0] * count, printed(workdir)
        (cells,) = workdir.glob('sweep/*/sweep.json')
        (record,) = workdir.glob('evaluations/*/record.json')
        images = [np.load(path) for path in sorted(cells.parent.glob('cells/*.npy'))]
        rows = json.loads(cells.read_text(encoding='utf-8'))['cells']
        rows += json.loads(record.read_text(encoding='utf-8'))['metrics']
        return images, [(row['value'], row['standard_error']) for row in rows]

    by_two = aside.submit(measured, 2)
    images, values = measured(1)
    assert len(images) == 6 and len(values) == 14  # two metrics of each cell and of the file
    np.testing.assert_array_equal(by_two.result()[0], images)
    np.testing.assert_allclose(by_two.result()[1], values, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_a_host_that_dies_ends_the_others(tmp_path, killed):
    """Within the timeout and with a message, whether it is the coordinator (0) or another."""
    workdir, timeout = tmp_path / 'run', 20
    endless = dict(train__num_steps=10**6, distributed__timeout=timeout)
    with hosts(2, 1, workdir, config=QUICK, **endless) as processes:
        wait_for_step(processes, workdir, 3)
        processes[killed].kill()
        started = time.monotonic()
        other = processes[1 - killed]
        wait([other], workdir)
        assert time.monotonic() - started < timeout + 20
    assert other.returncode not in (0, None)
    assert any(word in printed(workdir, 1 - killed) for word in ('another host failed', 'another task died'))


# ── Hosts that do not belong together ────────────────────────────────────────────────────────────────────────────────


def refuse(workdir, count, **how):
    """Start hosts that refuse to run together. Returns what each printed, and asserts that no run was begun."""
    with hosts(count, 1, workdir, **how) as processes:
        statuses = wait(processes, workdir, patience=120)
        outputs = [printed(workdir, process_id) for process_id in range(count)]
    assert statuses == [1] * count, '\n---\n'.join(outputs)
    assert not any('Traceback' in output for output in outputs), '\n---\n'.join(outputs)
    assert not (workdir / 'checkpoints').exists() and not (workdir / 'config.json').exists()
    return outputs


def different_commands(folder):
    """Three hosts: the second has another mode and another optax, the third another seed, rate and number of steps."""
    metadata = folder / 'other' / 'optax-0.0.1.dist-info' / 'METADATA'
    metadata.parent.mkdir(parents=True)
    metadata.write_text('Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n')
    own = [
        ['--mode=sample'],
        ['--mode=likelihood'],
        ['--mode=sample', '--config.seed=1', '--config.train.learning_rate=0.02', '--config.train.num_steps=5'],
    ]
    return refuse(folder / 'run', 3, own=own.__getitem__, environment={1: {'PYTHONPATH': str(folder / 'other')}})


def different_images(folder, of_the_second, shards=1):
    """Two hosts with folders of their own, and caches of their own, as is allowed; the second lacks what it should."""
    for process_id in range(2 if of_the_second == 'one picture' else 1):
        pictures = folder / str(process_id) / 'pictures'
        pictures.mkdir(parents=True)
        for number in range(20):
            other = process_id * (number == 19)
            content = encoded(Image.new('L', (8, 8), number + other)) + b'more' * other
            (pictures / f'{number}.png').write_bytes(content)
    return refuse(
        folder / 'run',
        2,
        data__source='folder:pictures',
        data__shards=shards,
        own=lambda i: [f'--config.data.{key}={folder / str(i)}' for key in ('data_dir', 'cache_dir')],
    )


# A process that does not wait for a minute, within which real hosts are started.
HASTY = (
    'import runpy, sys\n'
    'from diffusion.runtime import hosts\n'
    'hosts.MIN_TIMEOUT = 3\n'
    "sys.argv[0] = 'main.py'\n"
    "runpy.run_path('main.py', run_name='__main__')\n"
)


def hasty(workdir, *more, **environment):
    """Run one host whose peers do not come. Returns (exit status, output)."""
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


def no_coordinator(folder, address):
    return hasty(folder / 'run', *joins(address, 2, 1))


def no_peer(folder, address):
    return hasty(folder / 'run', *joins(address, 2, 0))


def no_slurm_peer(folder):
    """SLURM announces two processes, but there is one."""
    slurm = {'JOB_ID': str(free_port()), 'STEP_NODELIST': 'localhost', 'NTASKS': '2', 'PROCID': '0', 'LOCALID': '0'}
    return hasty(folder / 'run', **{f'SLURM_{key}': value for key, value in slurm.items()})


def unknown_pods(folder):
    """Kubernetes does not know the pods' names yet. JAX asks its library, for which this one stands in."""
    library = folder / 'kubernetes'
    library.mkdir()
    (library / '__init__.py').write_text('from kubernetes import client, config\n')
    (library / 'config.py').write_text('def load_incluster_config(): pass\n')
    exceptions = "exceptions = type('', (), {'ApiException': type('ApiException', (Exception,), {})})\n"
    (library / 'client.py').write_text(f'CoreV1Api = BatchV1Api = object\n{exceptions}')
    environment = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'HOSTNAME': 'pod-0.invalid', 'PYTHONPATH': str(folder)}
    return hasty(folder / 'run', **environment)


@pytest.fixture(scope='module')
def refusals(tmp_path_factory, aside):
    """{case: future of what it printed}, of all cases at once, because each waits most of the time."""

    def start(case, *arguments):
        return aside.submit(case, tmp_path_factory.mktemp(case.__name__), *arguments)

    return {
        'commands': start(different_commands),
        'one picture': start(different_images, 'one picture'),
        'all pictures': start(different_images, 'all pictures'),
        'one picture of a shard': start(different_images, 'one picture', 2),
        'coordinator': start(no_coordinator, REFUSING),
        'peer': start(no_peer, LONELY),
        'slurm': start(no_slurm_peer),
        'pods': start(unknown_pods),
    }


REFUSING, LONELY = (f'127.0.0.1:{free_port()}' for _ in range(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    'words',
    [
        '--mode: process 0 has sample, process 1 has likelihood',
        'the version of optax: process 0 has ',
        ', process 1 has 0.0.1\n',
        'config.seed: process 0 has 0, process 2 has 1\n',
        'config.train.learning_rate: process 0 has 0.01, process 2 has 0.02',
        'config.train.num_steps: process 0 has 4, process 2 has 5',
        'are not the same on all hosts',
    ],
)
def test_differences_between_commands_are_named_by_all_hosts(refusals, words):
    """In the mode, in the software, and in keys none of which is wrong by itself."""
    assert all(words in output for output in refusals['commands'].result())


def test_one_difference_is_named_as_one(monkeypatch):
    monkeypatch.setattr(our_hosts, 'differences', lambda values: dict.fromkeys(values, 'other'))
    with pytest.raises(RunError, match=r'^--mode is not the same on all hosts\n    --mode: other\nDo that\.$'):
        build.require_same({'--mode': 'train'}, 'Do that.')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('case', 'digest'),
    [
        ('one picture', '20 images with SHA-256'),
        ('one picture of a shard', '20 pictures whose names and sizes have SHA-256'),
    ],
)
def test_other_images_are_refused_by_all_hosts(refusals, case, digest):
    for output in refusals[case].result():
        assert 'config.data.source is not the same on all hosts' in output
        assert f'process 0 has {digest}' in output and f'process 1 has {digest}' in output


@pytest.mark.slow
def test_what_one_host_cannot_load_is_told_by_all(refusals):
    for output in refusals['all pictures'].result():
        assert re.search(r'error: process 1: config.data: there is no folder .*/1/pictures', output)


def assert_tries_again(found, *words):
    """One line says what is missing, and the exit status is that after which launchers start it again."""
    status, output = found
    assert status == EXIT_STATUS, output
    (line,) = [line for line in output.splitlines() if line.startswith('error:')]
    for word in words:
        assert word in line, output
    assert 'Traceback' not in output and 'stack trace' not in output, output


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer_is_named(refusals):
    found = refusals['coordinator'].result()
    assert f'process 1: waiting for 2 processes at {REFUSING}' in found[1]
    assert_tries_again(found, f'config.distributed.coordinator={REFUSING}', 'process 0')


def test_a_coordinator_whose_name_is_unknown_is_named(monkeypatch, capsys):
    monkeypatch.setattr(our_hosts, 'MIN_TIMEOUT', 0)
    address = f'no-such-host.invalid:{free_port()}'
    with pytest.raises(our_hosts.NotMetError, match=f'config.distributed.coordinator={address} .* process 0'):
        our_hosts.connect(coordinator=address, num_processes=2, process_id=1, detect=True, timeout=0)
    assert f'process 1: waiting for 2 processes at {address}' in capsys.readouterr().out


@pytest.mark.slow
def test_a_host_that_does_not_come_is_missed(refusals):
    found = refusals['peer'].result()
    assert f'process 0: waiting for 2 processes at {LONELY}' in found[1]
    assert_tries_again(found, f'config.distributed.coordinator={LONELY}', 'config.distributed.num_processes', '3 s')


@pytest.mark.slow
def test_a_host_that_slurm_announces_is_missed(refusals):
    assert_tries_again(refusals['slurm'].result(), 'not met', 'config.distributed.detect=False')


@pytest.mark.slow
def test_pods_whose_names_are_not_known_yet_try_again(refusals):
    assert_tries_again(refusals['pods'].result(), 'do not meet', 'config.distributed.detect=False')


# ── Settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────

CONTRADICTIONS = [
    (('coordinator=127.0.0.1', 'num_processes=2', 'process_id=0'), ("'127.0.0.1'", 'host:port')),
    (('coordinator=10.0.0.1:http', 'num_processes=2', 'process_id=0'), ("'10.0.0.1:http'", 'host:port')),
    (('coordinator=127.0.0.1:1', 'num_processes=2', 'process_id=2'), ('process_id=2', 'num_processes=2')),
    (('coordinator=127.0.0.1:1', 'num_processes=2'), ('process_id=-1',)),
    (('coordinator=127.0.0.1:1',), ('num_processes=0',)),
    (('num_processes=2', 'process_id=0'), ('coordinator', 'host:port')),
    (('process_id=0',), ('coordinator', 'host:port')),
]


@pytest.mark.parametrize(('changes', 'words'), CONTRADICTIONS, ids=lambda value: ' '.join(value))
def test_settings_that_contradict_each_other_are_named(changes, words, monkeypatch):
    monkeypatch.setattr(our_hosts.jax.distributed, 'initialize', lambda **_: pytest.fail('they were used'))
    monkeypatch.setattr(our_hosts, 'MIN_TIMEOUT', 0)
    settings = dict(change.split('=') for change in changes)
    config = tiny({'distributed.timeout': 1})
    config.distributed.update(
        {key: int(value) if value.lstrip('-').isdigit() else value for key, value in settings.items()}
    )
    with pytest.raises(RunError, match=r'^config\.distributed: ') as error:
        build.join_hosts(config, 'train')
    for word in words:
        assert word in str(error.value)


@pytest.mark.slow
def test_they_are_refused_on_the_command_line(tmp_path):
    asked = [f'--config.distributed.{change}' for change in ('coordinator=127.0.0.1:1', 'num_processes=2')]
    assert_refused(main(*flags(tmp_path / 'run'), *asked), 'config.distributed', 'process_id=-1')
    assert not (tmp_path / 'run').exists()


def test_on_a_lone_machine_nothing_is_detected(monkeypatch):
    """And nothing printed is lost."""
    for name in os.environ:
        if name.startswith(('SLURM_', 'OMPI_', 'KUBERNETES_', 'TPU_', 'CLOUD_TPU_', 'JAX_')):
            monkeypatch.delenv(name)
    program = (
        'import sys, jax\n'
        'from diffusion.runtime import hosts\n'
        "nothing = dict(coordinator='', num_processes=0, process_id=-1, timeout=100)\n"
        'out = sys.stdout\n'
        'hosts.connect(detect=True, **nothing)\n'
        'hosts.connect(detect=False, **nothing)\n'
        'assert sys.stdout is out and jax.process_count() == 1\n'
        'assert jax.distributed.is_initialized() is False\n'
    )
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_failure_is_blamed_on_others_only_where_there_are_some(monkeypatch):
    error = TimeoutError('no answer for 100 s\nmore')
    assert our_hosts.lost(error) is None
    monkeypatch.setattr(our_hosts.jax, 'process_count', lambda: 4)
    monkeypatch.setattr(our_hosts.jax, 'process_index', lambda: 2)
    assert 'process 2 of 4' in our_hosts.lost(error) and 'no answer for 100 s)' in our_hosts.lost(error)
    assert our_hosts.lost(ValueError('a bug')) is None
    of_gloo = ValueError('UNKNOWN: Gloo all-reduce failed: Read error [127.0.0.1]:49544: Connection reset by peer')
    assert 'Connection reset' in our_hosts.lost(of_gloo)
