"""From images on disk to the batches of training: the same whatever the number of hosts, the placement, the start."""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import celeba, digits
from diffusion import data, experiment, train
from diffusion.experiment import RunError
from diffusion.runtime import mesh as meshes
from tests.galleries import encoded, fill, noise, picture_feature, write_tfds
from tests.test_main import ROOT, assert_refused, main
from tests.test_train import TINY, assert_bitwise, saved, tiny

IMAGES = noise(40, 8, 8, 1)
PNG = [encoded(image) for image in IMAGES]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def pictures(tmp_path):
    """A folder of them, in classes."""
    return fill(tmp_path / 'pictures', {f'{"abc"[i % 3]}/{i:02d}.png': PNG[i] for i in range(40)})


def config_of(pictures, **changes):
    return tiny({'data.source': f'folder:{pictures}'} | {key.replace('__', '.'): v for key, v in changes.items()})


# The order.


@settings(max_examples=30)
@given(st.integers(4, 60), st.integers(1, 8), st.integers(0, 2**31 - 1), st.integers(0, 50))
def test_hosts_share_the_same_batches(num_images, size, seed, step):
    """One after the other, their parts are the batch of a single host."""
    whole = data.Order(num_images, 4 * size, seed)[step]
    for hosts in (1, 2, 4):
        parts = [data.Order(num_images, 4 * size, seed, host=host, hosts=hosts)[step] for host in range(hosts)]
        assert {part.shape for part in parts} == {(4 * size // hosts,)}
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        assert whole.dtype == parts[0].dtype == np.int32


def test_a_batch_that_hosts_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r'batch of 6 images .* 4 hosts'):
        data.Order(40, 6, 0, host=0, hosts=4)


@pytest.mark.parametrize('start', [0, 7, 29])
def test_batches_fetched_ahead_come_in_order(pictures, start):
    """Over the ends of epochs, from any step on; from memory, from the cache and decoded anew."""
    source = {'image_size': 8, 'channels': 1}
    cached = data.load(f'folder:{pictures}', **source)
    order = data.Order(40, 16, seed=3)
    for images in (cached, data.load(f'folder:{pictures}', cache=False, **source), data.Images(IMAGES, None, {})):
        batches = list(data.prefetch(images, order, start, 30))
        assert len(batches) == 30 - start
        for k, batch in enumerate(batches, start):
            assert batch.dtype == np.uint8
            np.testing.assert_array_equal(batch, images.images[:][order[k]])


def test_hosts_fetch_their_own_parts():
    images, steps = data.Images(IMAGES, None, {}), (5, 9)
    whole = list(data.prefetch(images, data.Order(40, 16, 0), *steps))
    parts = [data.prefetch(images, data.Order(40, 16, 0, host=host, hosts=4), *steps) for host in range(4)]
    for batch, *shares in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(shares), batch)


def test_batches_are_fetched_before_they_are_asked_for():
    """While a step is under way, the next ones' batches are being gathered."""
    asked = []

    class Slow:
        def __getitem__(self, indices):
            time.sleep(0.02)
            asked.append(indices)
            return IMAGES[indices]

    batches = data.prefetch(data.Images(Slow(), None, {}), data.Order(40, 4, 0), 0, 100)
    next(batches)
    deadline = time.monotonic() + 30
    while len(asked) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(asked) >= 5
    time.sleep(0.2)
    assert len(asked) < 60  # and not all of them: they would fill the memory


# What the step is given.


@pytest.mark.parametrize(('placement', 'fits'), [('device', True), ('host', True), ('auto', True), ('auto', False)])
def test_a_step_is_given_the_images_of_its_order(pictures, monkeypatch, placement, fits):
    monkeypatch.setattr(meshes, 'fits', lambda mesh, nbytes: fits)
    config = config_of(pictures, data__placement=placement, train__num_steps=8, seed=5)
    images = experiment.load_images(config)
    given = list(train.feed(config, experiment.build(config), images, 3))
    assert len(given) == 5
    order = data.Order(40, 16, 5)
    for k, (batch, indices) in enumerate(given, 3):
        on_device = placement != 'host' and fits
        assert (indices is not None) == on_device
        assert isinstance(batch, jax.Array)
        shown = np.asarray(batch if indices is None else batch[indices])
        np.testing.assert_array_equal(shown, IMAGES[np.argsort(np.arange(40) % 3, kind='stable')][order[k]])


def test_placements_that_cannot_be_are_named(pictures):
    for changes, words in [
        (dict(data__placement='gpu'), "config.data.placement is 'gpu'"),
        (dict(data__placement='device', data__cache=False), 'config.data.cache=False'),
    ]:
        config = config_of(pictures, **changes)
        with pytest.raises(RunError, match=re.escape(words)):
            next(train.feed(config, experiment.build(config), experiment.load_images(config), 0))


def test_training_is_the_same_wherever_the_images_are(pictures):
    """Bit by bit: on the device; on the host, from the cache, or decoded anew and stopped on the way."""
    ends, step_fns = [], {}
    initial = None
    for changes, starts in [
        (dict(data__placement='device'), (0,)),
        (dict(data__placement='host'), (0,)),
        (dict(data__cache=False), (0, 3)),
    ]:
        config = config_of(pictures, **changes, data__flip=True, train__num_steps=5)
        exp = experiment.build(config)
        initial = initial or jax.jit(exp.init)(jax.random.key(0))
        state = jax.tree.map(lambda leaf: leaf.copy(), initial)
        images = experiment.load_images(config)
        for start, stop in zip(starts, (*starts[1:], 5), strict=True):
            batches = train.feed(config, exp, images, start)
            for _ in range(start, stop):
                batch = next(batches)
                placed = batch[1] is None
                step_fns[placed] = step_fns.get(placed) or train.compile_step(config, exp, state, *batch)
                state, _ = step_fns[placed](state, *batch)
        ends.append(state)
    assert len(step_fns) == 2
    expected = {str(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(ends[0])}
    for end in ends[1:]:
        assert_bitwise(
            {str(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(end)}, expected
        )
    changed = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (ends[0], initial)), strict=True)]
    assert np.mean(changed) > 0.9


# Whole runs on what is refused, before anything is compiled.


def test_a_batch_larger_than_the_data_is_refused(pictures, tmp_path):
    with pytest.raises(RunError, match=r'config.train.batch_size is 48, but there are only 40 images'):
        train.run(config_of(pictures, train__batch_size=48), str(tmp_path / 'run'))
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_other_images_are_refused_with_their_numbers(pictures, tmp_path):
    """At another place they are the same; a picture more, or another, is not."""
    config = config_of(pictures)
    experiment.remember_config(config, str(tmp_path / 'run'), experiment.load_images(config))
    moved = config_of(pictures.rename(tmp_path / 'moved'), data__cache=False, data__placement='host')
    experiment.check_config(moved, str(tmp_path / 'run'), experiment.load_images(moved))
    fill(tmp_path / 'moved', {'a/00.png': PNG[1]})
    with pytest.raises(RunError, match=r'the images: 40, preprocessed \w+ there; 40, '):
        experiment.check_config(moved, str(tmp_path / 'run'), experiment.load_images(moved))
    fill(tmp_path / 'moved', {'a/00.png': PNG[0], 'a/more.png': PNG[0]})
    with pytest.raises(RunError) as error:
        train.run(moved, str(tmp_path / 'run'))
    for words in ('the images: 40, preprocessed', '41, preprocessed', str(tmp_path / 'moved'), str(tmp_path / 'run')):
        assert words in str(error.value)


def test_classes_with_names_in_any_script_are_remembered(tmp_path):
    """Also with one that is no Unicode."""
    for name in (b'\xe7\x8c\xab', b'caf\xe9'):
        folder = os.fsencode(tmp_path / 'p') + b'/' + name
        os.makedirs(folder)
        with open(folder + b'/1.png', 'wb') as file:
            file.write(PNG[0])
    config = config_of(tmp_path / 'p')
    experiment.remember_config(config, str(tmp_path / 'run'), experiment.load_images(config))
    stored = experiment.read_config(str(tmp_path / 'run'))
    assert stored['images']['classes'] == ['caf\udce9', '猫']


# CelebA, as the config of its name takes it.


def celeba_config(source, data_dir=''):
    config = celeba.get_config()
    config.update_from_flattened_dict(
        TINY | {'data.source': source, 'data.data_dir': str(data_dir), 'train.num_steps': 2, 'train.batch_size': 4}
    )
    return config


@pytest.fixture
def faces(tmp_path):
    """The 178×218 JPEGs of CelebA, unpacked as its authors packed them, and as TFDS prepares them."""
    pictures = [encoded(image, 'jpeg') for image in noise(6, 218, 178, 3)]
    fill(tmp_path / 'celeba', {f'img_align_celeba/{i + 1:06d}.jpg': pictures[i] for i in range(6)})
    fill(tmp_path / 'celeba', {'list_attr_celeba.txt': b'6\n'})
    examples = {'train': [(picture, None) for picture in pictures], 'test': [(pictures[0], None)]}
    write_tfds(tmp_path / 'tfds', 'celeb_a', examples, image=picture_feature('218', '178'), version='2.1.0')
    return tmp_path


def test_celeba_is_the_same_from_a_folder_and_from_tfds(faces):
    from_folder = celeba_config(f'folder:{faces / "celeba"}')
    from_tfds = celeba_config('tfds:celeb_a', faces / 'tfds')
    one, other = experiment.load_images(from_folder), experiment.load_images(from_tfds)
    assert one.images.shape == (6, 64, 64, 3)
    np.testing.assert_array_equal(one.images, other.images)
    assert one.record == other.record
    assert one.record['preprocessing']['crop'] == 'ddim'
    experiment.remember_config(from_folder, str(faces / 'run'), one)
    experiment.check_config(from_tfds, str(faces / 'run'), other)


def test_celeba_trains_from_tfds_without_tensorflow(faces):
    """A few steps by the command line, with a network that is small; and what has been imported by the end."""
    config = celeba_config('tfds:celeb_a', faces / 'tfds')
    keys = ('model.channels', 'model.groups', 'model.multipliers', 'model.attention_resolutions', 'model.num_blocks')
    keys += ('schedule.T', 'schedule.beta_end', 'train.num_steps', 'train.batch_size', 'data.data_dir')
    flat = {key: config[key.split('.')[0]][key.split('.')[1]] for key in keys}
    code = (
        'import runpy, sys\n'
        'try:\n    runpy.run_path("main.py", run_name="__main__")\n'
        'finally:\n    print("imported", sorted({"tensorflow", "torch", "keras"} & set(sys.modules)))'
    )
    arguments = ['--config=configs/celeba.py', f'--workdir={faces / "run"}', '--config.data.placement=host']
    done = subprocess.run(
        [sys.executable, '-c', code, *arguments, *(f'--config.{key}={value}' for key, value in flat.items())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert '6 images of tfds:celeb_a' in done.stdout and 'complete: 2 steps' in done.stdout
    assert done.stdout.splitlines()[-1] == 'imported []'
    assert saved(faces / 'run') == [2]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_decoding_ends_in_one_line(pictures, tmp_path, number):
    """At the command line: status 75, no traceback, nothing half-made."""
    code = (
        'import runpy, sys, time\n'
        'from diffusion.data import pictures\n'
        'slow = pictures.decode\n'
        'pictures.decode = lambda content: (time.sleep(0.2), slow(content))[1]\n'
        'print("begins", flush=True)\n'
        'runpy.run_path("main.py", run_name="__main__")'
    )
    arguments = [
        '--config=configs/digits.py',
        f'--workdir={tmp_path / "run"}',
        f'--config.data.source=folder:{pictures}',
    ]
    process = subprocess.Popen(
        [sys.executable, '-c', code, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        kept = tmp_path / 'cache' / 'diffusion'
        while not list(kept.glob('*.new/images.bin')) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    told = 'interrupted: nothing is written yet; the same command starts over'
    assert 'Traceback' not in errors and errors.splitlines()[-1].endswith(told)
    assert [path.suffix for path in kept.iterdir()] == ['.lock']
    assert not (tmp_path / 'run').exists()


def test_a_missing_dataset_is_an_error_in_a_few_lines(tmp_path):
    done = main('--config=configs/celeba.py', f'--workdir={tmp_path / "run"}', f'--config.data.data_dir={tmp_path}')
    assert_refused(done, f'{tmp_path}/celeb_a', 'make prepare DATASET=celeb_a', '--config.data.source=folder:')
    assert done.stdout == '' and len(done.stderr.splitlines()) == 4


def test_the_digits_have_a_record_too():
    config = digits.get_config()
    images = experiment.load_images(config)
    assert images.record['count'] == 1498 and len(images.labels) == 1498
    assert images.record['classes'] == [str(i) for i in range(10)]
