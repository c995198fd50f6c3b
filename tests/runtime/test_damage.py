"""Damaged checkpoints: found, named, skipped, and put aside."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.runtime.checkpoints import Checkpoints, DamagedError, checksums, newest_record, read_about
from tests.runtime.common import assert_same, describe, python

STEPS = (1, 2, 3)


def make_params(step):
    """Return parameters of a step; the first arrays are so large that each has a file of its own."""
    rng = np.random.default_rng(step)
    sizes = {'a': 9000, 'b': 9000, 'c': 3}
    return {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}


ABSTRACT = describe(make_params(0))


def write(folder, params):
    """Write a checkpoint for each step."""
    with Checkpoints(folder, keep=9, writing=True) as checkpoints:
        for step, tree in params.items():
            checkpoints.save(step, params=tree)
    return folder


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    return write(tmp_path_factory.mktemp('originals') / 'checkpoints', {step: make_params(step) for step in STEPS})


@pytest.fixture(scope='module')
def others(tmp_path_factory):
    """Checkpoints with the same names and shapes, but other values."""
    return write(tmp_path_factory.mktemp('others') / 'checkpoints', {step: make_params(10 + step) for step in STEPS})


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / 'run' / 'checkpoints')


def exchange(folder, others, step):
    """Replace the arrays of a checkpoint by those of another run: each file is intact."""
    shutil.rmtree(folder / str(step) / 'params')
    shutil.copytree(others / str(step) / 'params', folder / str(step) / 'params')


def restore(folder, step):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(step, params=ABSTRACT)[0]


def restore_newest(folder):
    """Return (step, params, warnings)."""
    warnings = []
    with Checkpoints(folder) as checkpoints:
        step, (params,) = checkpoints.restore_newest(warnings.append, params=ABSTRACT)
    return step, params, warnings


def test_arrays_with_other_values_are_refused(folder, others):
    exchange(folder, others, 2)
    with pytest.raises(DamagedError, match='the checksums of 3 arrays differ') as error:
        restore(folder, 2)
    assert str(folder / '2') in str(error.value)
    assert_same(restore(folder, 3), make_params(3))


def test_no_flipped_bit_of_the_description_passes(folder):
    """One in the name of an array would otherwise make it look like a checkpoint of another network."""
    file = folder / '2' / 'about' / 'metadata'
    written, intact = file.read_bytes(), read_about(folder / '2')
    for place in range(len(written)):
        flipped = bytearray(written)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            about = read_about(folder / '2')
        except ValueError:
            continue
        # The flipped bit is in the name of the digest, without which a description is taken as it is.
        assert {key: about.get(key) for key in intact} == intact and len(about) == len(intact) + 1


@pytest.mark.parametrize(
    'content', ['[]', '{}', '{"record": 1}', '{"record": {}, "shapes": []}', '{"record": {}, "shapes": [1]}']
)
def test_what_describes_no_checkpoint_is_refused(folder, content):
    for step in (2, 3):
        (folder / str(step) / 'about' / 'metadata').write_text(content)
    with pytest.raises(ValueError, match='about/ does not describe a checkpoint'):
        read_about(folder / '3')
    assert newest_record(folder) == read_about(folder / '1')['record']


def test_a_description_may_have_keys_that_json_makes_strings(tmp_path):
    with Checkpoints(tmp_path, writing=True) as checkpoints:
        checkpoints.save(1, {'model': {key: key for key in range(12)}}, params=make_params(1))
    assert_same(restore(tmp_path, 1), make_params(1))


def test_a_lack_of_memory_is_no_damage(folder, monkeypatch):
    def fail(path):
        raise MemoryError

    monkeypatch.setattr('diffusion.runtime.checkpoints.read_about', fail)
    with pytest.raises(MemoryError):
        restore_newest(folder)


def test_one_array_with_other_values_is_refused_by_its_name(folder, tmp_path):
    other = write(tmp_path / 'other', {2: make_params(2) | {'b': make_params(2)['b'].at[17].add(1e-3)}})
    exchange(folder, other, 2)
    with pytest.raises(DamagedError, match=r"checksums of 1 arrays .*params\['b'\]"):
        restore(folder, 2)


def test_exchanged_arrays_are_refused(folder, tmp_path):
    params = make_params(2)
    exchange(folder, write(tmp_path / 'other', {2: params | {'a': params['b'], 'b': params['a']}}), 2)
    with pytest.raises(DamagedError, match='2 arrays'):
        restore(folder, 2)


def test_a_pipe_is_refused_before_anything_is_read(folder):
    """Reading it would block."""
    os.mkfifo(folder / '2' / 'params' / 'pipe')
    with pytest.raises(DamagedError, match='params/pipe is not a regular file'):
        restore(folder, 2)


def test_a_checkpoint_of_another_step_is_refused(folder):
    """Training would continue at a step to which the parameters do not belong."""
    shutil.rmtree(folder / '3')
    (folder / '2').rename(folder / '3')
    with pytest.raises(DamagedError, match='it holds step 2') as error:
        restore(folder, 3)
    assert str(folder / '3') in str(error.value)


def flip(path, byte, bit):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize('place', [0.3, 0.5, 0.9])
def test_a_flipped_bit_is_found(folder, place):
    """In the largest files, which hold the arrays."""
    files = sorted((path for path in (folder / '3').rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
    assert files[-1].stat().st_size > 30_000
    flip(files[-1], int(place * files[-1].stat().st_size), 0)
    with pytest.raises(DamagedError, match='is damaged') as error:
        restore(folder, 3)
    assert str(folder / '3') in str(error.value)


# Restores two checkpoints, and prints the type of the error and the number of lines in each message.
QUIET = """
import gc, sys
import jax
from absl import logging
from diffusion.runtime import mesh as meshes
from diffusion.runtime.checkpoints import Checkpoints, DamagedError

hooks = sys.excepthook, sys.unraisablehook
logging.set_verbosity(logging.FATAL)  # as main.py does
mesh = meshes.make_mesh(4)
tree = {name: jax.ShapeDtypeStruct(shape, 'float32', sharding=meshes.replicated(mesh))
        for name, shape in {'a': (9000,), 'b': (9000,), 'c': (3,)}.items()}
tree['b'] = jax.ShapeDtypeStruct((9000,), 'float32', sharding=meshes.split_batch(mesh))
with Checkpoints(sys.argv[1]) as checkpoints:
    for step in (2, 3):
        try:
            checkpoints.restore(step, params=tree)
        except DamagedError as error:
            print(type(error).__name__, len(str(error).splitlines()))
gc.collect()
assert hooks == (sys.excepthook, sys.unraisablehook)
"""


def test_a_damaged_checkpoint_gives_one_message_and_nothing_on_stderr(folder):
    """Several reads of several shards fail at once, in TensorStore's threads; only the first error is ours to tell."""
    for step, damage in ((2, lambda path: path.unlink()), (3, lambda path: path.write_bytes(b''))):
        for path in (folder / str(step) / 'params').rglob('d/*'):
            damage(path)
    done = python(QUIET, folder, JAX_PLATFORMS='cpu', XLA_FLAGS='--xla_force_host_platform_device_count=4')
    assert (done.stdout, done.stderr) == ('DamagedError 1\n' * 2, '')


def test_the_newest_intact_checkpoint_is_used_and_the_others_are_named(folder, others):
    step, params, warnings = restore_newest(folder)
    assert (step, warnings) == (3, [])
    assert_same(params, make_params(3))
    exchange(folder, others, 3)
    step, params, warnings = restore_newest(folder)
    assert step == 2 and len(warnings) == 1
    assert str(folder / '3') in warnings[0] and 'using the checkpoint of step 2' in warnings[0]
    assert_same(params, make_params(2))
    shutil.rmtree(folder / '2' / 'params')
    step, params, warnings = restore_newest(folder)
    assert step == 1
    assert all(str(folder / name) in warning for name, warning in zip('32', warnings, strict=True))
    assert_same(params, make_params(1))


def test_if_all_are_damaged_each_is_named(folder, others):
    for step in STEPS:
        exchange(folder, others, step)
    with pytest.raises(DamagedError, match='no intact checkpoint') as error:
        restore_newest(folder)
    assert all(str(folder / str(step)) in str(error.value) for step in STEPS)


def test_without_any_checkpoint_there_is_none(tmp_path):
    with Checkpoints(tmp_path / 'checkpoints', writing=True) as checkpoints:
        assert checkpoints.restore_newest(pytest.fail, params=ABSTRACT) is None


def test_only_newer_checkpoints_are_put_aside(folder):
    run = folder.parent
    with Checkpoints(folder, keep=9, writing=True) as checkpoints:
        checkpoints.put_aside(3)
        assert checkpoints.steps() == [3, 2, 1] and list(run.iterdir()) == [folder]
        checkpoints.put_aside(2)
        assert checkpoints.steps() == [2, 1]
        checkpoints.save(3, params=make_params(33))
        checkpoints.wait()
        checkpoints.put_aside(1)
        assert checkpoints.steps() == [1]
    names = {'checkpoints', 'damaged-3', 'damaged-2', 'damaged-3-again'}
    assert {path.name for path in run.iterdir()} == names
    for name, step in [('damaged-3', 3), ('damaged-2', 2), ('damaged-3-again', 33)]:  # nothing in them is lost
        shutil.copytree(run / name, folder / name[8], dirs_exist_ok=True)
        assert_same(restore(folder, int(name[8])), make_params(step))
        shutil.rmtree(folder / name[8])


# Checksums


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def checksum(array):
    (value,) = checksums({'x': array}).values()
    return value


@given(st.sampled_from([np.float32, np.int32, jnp.bfloat16]), st.lists(st.integers(1, 3), max_size=2), st.data())
def test_any_flipped_bit_changes_a_checksum(dtype, shape, data):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    content = data.draw(st.binary(min_size=size, max_size=size))

    def found(content):
        return checksum(np.frombuffer(content, dtype).reshape(shape))

    whole = int.from_bytes(content, 'big')
    assert all(found((whole ^ 1 << bit).to_bytes(size, 'big')) != found(content) for bit in range(8 * size))


@given(st.integers(0, 99), st.integers(0, 99))
def test_two_exchanged_elements_change_a_checksum(i, j):
    array = numbers(4, 25).ravel()
    swapped = array.copy()
    swapped[[i, j]] = array[[j, i]]
    for shape in [(100,), (4, 25), (2, 5, 10)]:
        same = checksum(array.reshape(shape)) == checksum(swapped.reshape(shape))
        assert same == (i == j)


def test_a_checksum_depends_on_the_bits_and_their_positions():
    array = numbers(6, 6)
    assert checksum(array) == checksum(jnp.asarray(array)) == checksum(array.copy())
    assert checksum(np.float32([0.0])) != checksum(np.float32([-0.0]))
    others = [array.T, array[::-1], array[:, ::-1], np.roll(array, 1, 0), np.roll(array, 1, 1)]
    assert len({checksum(np.ascontiguousarray(other)) for other in [array, *others]}) == 6


def test_each_array_has_a_checksum_by_its_path():
    one = {'a': [numbers(3), numbers(2, seed=1)], 'b': {'c': jax.numpy.float32(2)}}
    other = {'a': [numbers(3), numbers(2, seed=2)], 'b': {'c': jax.numpy.float32(2)}}
    first, second = checksums(one), checksums(other)
    assert first.keys() == second.keys() and len(first) == 3
    assert [name for name in first if first[name] != second[name]] == ["['a'][1]"]
