"""What a run stands on, one by one: checkpoints, logs, small files, signals, devices."""

import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto.event_pb2 import Event

from diffusion.runtime import interrupt
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.files import write_json
from diffusion.runtime.interrupt import Interrupt
from diffusion.runtime.lock import Lock
from diffusion.runtime.writer import Writer

ROOT = pathlib.Path(__file__).parent.parent


def python(program, *args, **environment):
    """Run a program in a process of its own, in which the project can be imported."""
    return subprocess.run(
        [sys.executable, '-c', program, *map(str, args)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# Checkpoints


def make_trees(seed=0):
    """What training saves, in small: nested parameters and Adam's state after an update, with its counters."""
    rng = np.random.default_rng(seed)
    params = {
        'conv': {'kernel': jnp.asarray(rng.normal(size=(3, 3, 1, 4)), jnp.float32), 'bias': jnp.zeros(4)},
        'a': {},
    }
    params['scale'] = jnp.asarray(rng.normal(), jnp.float32)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda step: 0.1 / (1 + step)))
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    return {'params': params, 'ema': jax.tree.map(lambda leaf: leaf / 3, params), 'opt_state': opt_state}


def describe(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_checkpoint_comes_back_bit_by_bit_and_in_part(tmp_path):
    trees = make_trees()
    with Checkpoints(tmp_path / 'checkpoints', keep=2, writing=True) as checkpoints:
        assert checkpoints.steps() == []
        checkpoints.save(3, **trees)
    with Checkpoints(tmp_path / 'checkpoints', keep=2) as checkpoints:
        assert checkpoints.steps()[0] == 3
        opt_state, params = checkpoints.restore(
            3, opt_state=describe(trees['opt_state']), params=describe(trees['params'])
        )
        (ema,) = checkpoints.restore(3, ema=describe(trees['ema']))
    assert_same(params, trees['params'])
    assert_same(ema, trees['ema'])
    assert_same(opt_state, trees['opt_state'])
    assert int(opt_state[1][0].count) == 1


def test_the_newest_ones_are_kept(tmp_path):
    every = {step: make_trees(seed=step) for step in (1, 2, 5, 10)}
    with Checkpoints(tmp_path, keep=2, writing=True) as checkpoints:
        for step, trees in every.items():
            checkpoints.save(step, **trees)
    assert sorted(int(folder.name) for folder in tmp_path.iterdir()) == [5, 10]
    with Checkpoints(tmp_path, keep=2, writing=True) as checkpoints:
        assert checkpoints.steps()[0] == 10
        for step in (5, 10):
            (params,) = checkpoints.restore(step, params=describe(every[step]['params']))
            assert_same(params, every[step]['params'])


def test_what_is_saved_may_be_overwritten_at_once(tmp_path):
    """The next step reuses the buffers while Orbax still writes."""
    size = 2_000_000
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = step(jnp.zeros(size))
    with Checkpoints(tmp_path, keep=3, writing=True) as checkpoints:
        checkpoints.save(1, params={'x': x})
        for _ in range(20):
            x = step(x)
        jax.block_until_ready(x)
    with Checkpoints(tmp_path, keep=3, writing=True) as checkpoints:
        (params,) = checkpoints.restore(1, params=describe({'x': x}))
    np.testing.assert_array_equal(params['x'], np.ones(size))


def test_a_slow_disk_stops_nobody(tmp_path, monkeypatch):
    """It is held up until the loop has gone on; then another save waits for the first."""
    gone_on, save = threading.Event(), ocp.CheckpointManager.save
    monkeypatch.setattr(
        ocp.CheckpointManager, 'save', lambda *args, **kwargs: gone_on.wait(60) and save(*args, **kwargs)
    )
    x = jnp.zeros(1000)
    with Checkpoints(tmp_path, writing=True) as checkpoints:
        checkpoints.save(1, params={'x': x})
        assert not (tmp_path / '1').exists() and not checkpoints.failed
        gone_on.set()
        checkpoints.save(2, params={'x': x})
        assert (tmp_path / '1').exists()
    assert (tmp_path / '2').exists()


def test_what_goes_wrong_in_the_background_is_told(tmp_path, monkeypatch):
    x = jnp.zeros(1000)
    with Checkpoints(tmp_path, writing=True) as checkpoints:
        checkpoints.save(1, params={'x': x})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, 'save', lambda *args, **kwargs: os.stat('/nowhere'))
            checkpoints.save(2, params={'x': x})
            while not checkpoints.failed:
                time.sleep(0.01)
            with pytest.raises(OSError, match='/nowhere'):
                checkpoints.wait()
        assert not checkpoints.failed and checkpoints.steps() == [1]
        checkpoints.save(3, params={'x': x})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 1]


KILLED = """
import os, sys
import jax.numpy as jnp
from diffusion.runtime.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=3, writing=True) as checkpoints:
    checkpoints.save(1, params={'x': jnp.full(20, 1.0)})
with Checkpoints(sys.argv[1], keep=3, writing=True) as checkpoints:
    checkpoints.save(2, params={'x': jnp.full(40_000_000, 2.0)})
    while len(os.listdir(sys.argv[1])) < 2:
        pass
    os._exit(9)  # the process is killed as soon as something of the second checkpoint is there
"""


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path):
    killed = python(KILLED, tmp_path)
    assert killed.returncode == 9, killed.stderr
    assert len(list(tmp_path.iterdir())) == 2  # something of it is there
    with Checkpoints(tmp_path, keep=3, writing=True) as checkpoints:
        assert checkpoints.steps()[0] == 1
        (params,) = checkpoints.restore(1, params=describe({'x': jnp.zeros(20)}))
        np.testing.assert_array_equal(params['x'], np.ones(20))
        checkpoints.save(2, params={'x': jnp.full(20, 2.0)})  # and it is not in the way
    with Checkpoints(tmp_path, keep=3, writing=True) as checkpoints:
        assert checkpoints.steps()[0] == 2


# Logs


def test_logs_do_not_bring_pytorch_along(tmp_path):
    """Which tensorboardX imports where it can; whoever wants it finds it afterwards."""
    (tmp_path / 'torch.py').write_text('print("imported")')
    done = python('import diffusion.runtime.writer; print("logs"); import torch', PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == ['logs', 'imported'], done.stderr


def log(directory, *, step, steps):
    with Writer(str(directory), step=step) as writer:
        for k in steps:
            writer.scalars(k, loss=1 / k, learning_rate=k * 1e-3)
    for path in directory.glob('events.*'):  # they are named by the second in which they were opened
        path.rename(path.with_name(f'events.{time.time_ns()}' if path.name.count('.') > 1 else path.name))


def lines(directory):
    return [json.loads(line) for line in (directory / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def events(directory):
    """All TensorBoard events, oldest file first: records of length, checksum, Event, checksum."""
    for path in sorted(directory.glob('events.*')):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack_from('<Q', content)
            yield Event.FromString(content[12 : 12 + size])
            content = content[12 + size + 4 :]


def test_numbers_are_logged_twice(tmp_path):
    log(tmp_path / 'logs', step=0, steps=[1, 2])
    assert lines(tmp_path / 'logs') == [
        {'step': 1, 'loss': 1.0, 'learning_rate': 0.001},
        {'step': 2, 'loss': 0.5, 'learning_rate': 0.002},
    ]
    seen = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path / 'logs')
        for value in event.summary.value
    ]
    assert seen == [
        (step, tag, pytest.approx(value))
        for step, tag, value in [
            (1, 'loss', 1.0),
            (1, 'learning_rate', 0.001),
            (2, 'loss', 0.5),
            (2, 'learning_rate', 0.002),
        ]
    ]


def test_each_line_is_on_disk_at_once(tmp_path):
    with Writer(str(tmp_path), step=0) as writer:
        writer.scalars(1, loss=0.5)
        assert [line['step'] for line in lines(tmp_path)] == [1]


def test_what_is_done_again_is_logged_once(tmp_path):
    log(tmp_path, step=0, steps=[1, 2, 3, 4, 5])
    log(tmp_path, step=3, steps=[4])
    log(tmp_path, step=4, steps=[5, 6])
    assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    starts = [event.step for event in events(tmp_path) if event.session_log.status]
    assert starts == [1, 4, 5]  # by which TensorBoard drops what an earlier process logged beyond
    log(tmp_path, step=0, steps=[1])  # a run that ended before its first checkpoint
    assert [line['step'] for line in lines(tmp_path)] == [1]


@pytest.mark.parametrize(
    'torn', ['{"step": 3, "lo', '{', '{"step": 3, "loss": 0.25', '{"step": 3, "loss": 0.25}', '\0\0\0']
)
def test_a_torn_last_line_does_no_harm(tmp_path, torn):
    log(tmp_path, step=0, steps=[1, 2])
    with open(tmp_path / 'metrics.jsonl', 'a', encoding='utf-8') as file:
        file.write(torn)
    log(tmp_path, step=3, steps=[4])
    assert [line['step'] for line in lines(tmp_path) if line['step'] != 3] == [1, 2, 4]


def test_a_picture_is_logged(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    with Writer(str(tmp_path), step=0) as writer:
        writer.image(7, 'samples', picture)
    (value,) = (value for event in events(tmp_path) for value in event.summary.value)
    assert value.tag == 'samples' and (value.image.height, value.image.width) == (4, 6)
    assert value.image.encoded_image_string.startswith(b'\x89PNG')


# Small files


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'new' / 'folder' / 'record.json'
    write_json(str(path), {'η': 0.5, 'steps': [1, 2]})
    assert json.loads(path.read_text(encoding='utf-8')) == {'η': 0.5, 'steps': [1, 2]}
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(str(path), {'count': 3, 'wrong': object()})
    assert path.read_bytes() == before
    write_json(str(path), {'count': 4})
    assert json.loads(path.read_text(encoding='utf-8')) == {'count': 4}
    assert list(path.parent.iterdir()) == [path]


# Signals


def test_the_first_signal_asks_and_the_second_ends():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt() as asked:
        assert not asked
        signal.raise_signal(signal.SIGINT)
        assert asked and str(asked) == 'SIGINT'
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert asked
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_without_a_signal_all_is_as_before():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt() as asked:
        assert signal.getsignal(signal.SIGTERM) not in before
    assert not asked
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sigterm_likewise():
    done = python(
        'import signal\n'
        'from diffusion.runtime.interrupt import Interrupt\n'
        'with Interrupt() as asked:\n'
        '    signal.raise_signal(signal.SIGTERM)\n'
        '    print(asked, bool(asked), flush=True)\n'
        '    signal.raise_signal(signal.SIGTERM)\n'
        "    print('still here', flush=True)\n"
    )
    assert done.stdout.split() == ['SIGTERM', 'True'], done.stderr
    assert done.returncode == -signal.SIGTERM
    assert interrupt.EXIT_STATUS == 75


def test_a_signal_is_told_while_the_program_listens_to_nothing():
    """As while XLA compiles: within one call, without Python's lock. Once more ends it, but twice at a time is once."""
    program = (
        'import hashlib\n'
        'from diffusion.runtime.interrupt import Interrupt\n'
        'with Interrupt("part"):\n'
        '    print("begins", flush=True)\n'
        '    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)\n'
    )
    how = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, '-c', program], **how) as process:
        try:
            assert process.stdout.readline() == 'begins\n'
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            assert process.stderr.readline() == '\n'
            assert process.stderr.readline() == (
                'SIGTERM: the part ends, is saved, and the run ends; once more ends it at once\n'
            )
            time.sleep(1.2)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 128 + signal.SIGINT
        finally:
            process.kill()


# Devices

EIGHT_DEVICES = """
import json
import jax, numpy as np
from diffusion.runtime import mesh as meshes

SHAPES = [(), (1020,), (1024,), (3, 3, 8, 16), (3, 3, 16, 8), (3, 3, 6, 22), (12, 86), (6, 172), (1, 520, 2)]
seen = {'errors': [], 'shards': {}}
for fsdp in (0, 3, 16):
    try:
        meshes.make_mesh(fsdp)
    except ValueError as error:
        seen['errors'].append(str(error))
for fsdp in (1, 4, 8):
    mesh = meshes.make_mesh(fsdp)
    assert dict(mesh.shape) == {'data': 8 // fsdp, 'fsdp': fsdp}
    tree = [jax.ShapeDtypeStruct(shape, 'float32') for shape in SHAPES]
    shardings = meshes.split_state(mesh, tree)
    seen['shards'][fsdp] = [s.shard_shape(t.shape) for s, t in zip(shardings, tree, strict=True)]
    batch = jax.device_put(np.arange(16), meshes.split_batch(mesh))
    parts = [tuple(np.asarray(shard.data)) for shard in batch.addressable_shards]
    assert sorted(parts) == [(i, i + 1) for i in range(0, 16, 2)], parts
    whole = jax.device_put(np.arange(16), meshes.replicated(mesh))
    assert all(shard.data.shape == (16,) for shard in whole.addressable_shards)
mesh = meshes.make_mesh(4)
kernel = np.random.default_rng(0).normal(size=(3, 3, 8, 16)).astype('float32')
split = jax.device_put(kernel, meshes.split_state(mesh, kernel))
assert (np.asarray(split) == kernel).all()
print(json.dumps(seen))
"""


def test_eight_devices():
    done = python(EIGHT_DEVICES, XLA_FLAGS='--xla_force_host_platform_device_count=8', JAX_PLATFORMS='cpu')
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen['errors']) == 3
    for fsdp, error in zip((0, 3, 16), seen['errors'], strict=True):
        assert f'fsdp is {fsdp}' in error and '8 devices' in error
    few = [[], [1020]]  # whole, though 4 divides 1020
    shapes = [[1024], [3, 3, 8, 16], [3, 3, 16, 8], [3, 3, 6, 22], [12, 86], [6, 172], [1, 520, 2]]
    assert seen['shards']['1'] == few + shapes
    # the largest axis that 4 (8) divides is split; (3, 3, 6, 22) has none
    by_4 = [[256], [3, 3, 8, 4], [3, 3, 4, 8], [3, 3, 6, 22], [3, 86], [6, 43], [1, 130, 2]]
    by_8 = [[128], [3, 3, 8, 2], [3, 3, 2, 8], [3, 3, 6, 22], [12, 86], [6, 172], [1, 65, 2]]
    assert seen['shards']['4'] == few + by_4
    assert seen['shards']['8'] == few + by_8


def test_a_workdir_is_held_by_one_process_and_let_go_when_it_dies(tmp_path):
    program = f"""
import sys, time
from diffusion.runtime.lock import Lock
with Lock({str(tmp_path / 'run')!r}):
    print('held', flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == 'held\n'
        with (
            pytest.raises(BlockingIOError, match=f'process {process.pid} on .* is training'),
            Lock(str(tmp_path / 'run')),
        ):
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with Lock(str(tmp_path / 'run')), pytest.raises(BlockingIOError), Lock(str(tmp_path / 'run')):
        pass
