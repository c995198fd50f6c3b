"""From images on disk to the batches of a training run: the same for every placement and from every first step."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest

from diffusion import autoconfig, build, data, workdir
from diffusion.configs import celeba
from diffusion.modes import train
from diffusion.runtime import hosts, mesh
from diffusion.util import RunError
from tests.galleries import encoded, fill, noise, picture_feature, write_tfds
from tests.runs import ROOT, TINY, assert_bitwise, assert_refused, main, quick, saved, tiny

IMAGES = noise(40, 8, 8, 1)
PNG = [encoded(image) for image in IMAGES]
IN_ORDER = np.argsort(np.arange(40) % 3, kind='stable')  # by class folder, as the names sort


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def pictures(tmp_path):
    """Return a folder of pictures in three classes."""
    return fill(tmp_path / 'pictures', {f'{"abc"[i % 3]}/{i:02d}.png': PNG[i] for i in range(40)})


def config_of(pictures, **changes):
    return tiny({'data.source': f'folder:{pictures}'} | {key.replace('__', '.'): v for key, v in changes.items()})


@pytest.mark.parametrize(('placement', 'fits'), [('device', True), ('host', True), ('auto', True), ('auto', False)])
def test_a_step_gets_the_images_of_its_order(pictures, monkeypatch, placement, fits):
    monkeypatch.setattr(mesh, 'fits', lambda mesh, nbytes: fits)
    config = config_of(pictures, data__placement=placement, train__num_steps=8, seed=5)
    given = list(train.feed(config, build.build(config), build.load_images(config), 3))
    assert len(given) == 5
    order = data.Order(40, 16, 5)
    for k, (batch, indices) in enumerate(given, 3):
        assert (indices is not None) == (placement != 'host' and fits)
        assert isinstance(batch, jax.Array)
        shown = np.asarray(batch if indices is None else batch[indices])
        np.testing.assert_array_equal(shown, IMAGES[IN_ORDER][order[k]])


@pytest.mark.parametrize('placement', ['device', 'host'])
def test_a_step_gets_images_of_each_shard(pictures, placement):
    config = config_of(pictures, data__placement=placement, data__shards=4, train__num_steps=3)
    images = build.load_training_images(config)
    assert images.record['count'] == 40
    order = data.Order((10, 10, 10, 10), 16, 0, shards=4)
    for k, (batch, indices) in enumerate(train.feed(config, build.build(config), images, 0)):
        shown = np.asarray(batch if indices is None else batch[indices])
        np.testing.assert_array_equal(shown, IMAGES[IN_ORDER][order[k]])
        for shard, part in enumerate(np.split(shown, 4)):
            assert {image.tobytes() for image in part} <= {
                image.tobytes() for image in IMAGES[IN_ORDER][10 * shard : 10 * shard + 10]
            }


def on_hosts(monkeypatch, count, function):
    """Return what a function of the host returns on each of several, which are threads here."""
    here, barrier, given = threading.local(), threading.Barrier(count), {}

    def gather(value):
        given[here.host] = json.dumps(value)
        barrier.wait(60)
        values = [json.loads(given[host]) for host in range(count)]
        barrier.wait(60)
        return values

    def differences(values):
        of_hosts = gather(values)
        return {name: f'{text} and others' for name, text in of_hosts[0].items() if of_hosts != [of_hosts[0]] * count}

    def on(host):
        here.host = host
        try:
            return function(host)
        except RunError as error:
            return error

    monkeypatch.setattr(jax, 'process_count', lambda: count)
    monkeypatch.setattr(jax, 'process_index', lambda: getattr(here, 'host', 0))
    monkeypatch.setattr(hosts, 'gather', gather)
    monkeypatch.setattr(hosts, 'differences', differences)
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(on, range(count)))


@pytest.mark.parametrize(('count', 'shards'), [(2, 8), (3, 4), (4, 6), (8, 2), (3, 1)])
def test_several_hosts_feed_the_batches_of_one(pictures, tmp_path, monkeypatch, count, shards):
    """Bit by bit, from any step on, whether or not they divide the shards; a resume may have other hosts."""
    changes = dict(data__shards=shards, data__placement='host', train__batch_size=24, train__num_steps=7)
    config = config_of(pictures, **changes)
    exp, images = build.build(config), build.load_training_images(config)
    monkeypatch.setattr(mesh, 'put', lambda array, sharding: array)
    whole = [batch for batch, _ in train.feed(config, exp, images, 3)]

    def on(host):
        own = config_of(pictures, **changes, data__cache_dir=str(tmp_path / str(host)))
        images = build.load_training_images(own)
        return images.record, [batch for batch, _ in train.feed(own, exp, images, 3)]

    records, parts = zip(*on_hosts(monkeypatch, count, on), strict=True)
    assert all(record == images.record for record in records)
    for k, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[k] for part in parts]), batch)


def test_hosts_that_have_a_shard_in_common_compare_it(pictures, tmp_path, monkeypatch):
    """Three hosts have four shards. A picture of the second shard differs on the first host, but not in size."""
    flat = [encoded(np.full((8, 8), grey, np.uint8)) for grey in (10, 11)]
    assert len(flat[0]) == len(flat[1])

    def on(host):
        own = fill(tmp_path / str(host), {f'{i:02d}.png': flat[host == 0] if i == 15 else PNG[i] for i in range(40)})
        changes = dict(data__shards=4, data__cache_dir=str(tmp_path / 'cache' / str(host)), train__batch_size=24)
        return build.load_training_images(config_of(own, **changes))

    for error in on_hosts(monkeypatch, 3, on):
        assert isinstance(error, RunError)
        assert re.search(r'shard 1: process 0 has 10 images with SHA-256 \w+, process 1 has 10 images', str(error))


@pytest.fixture
def many(monkeypatch):
    """Let 40 pictures be many, and five of them enough for a shard."""
    monkeypatch.setattr(autoconfig, 'WHOLE', 0)
    monkeypatch.setattr(autoconfig, 'PICTURES_OF_SHARD', 5)


def test_the_chosen_number_of_shards_does_not_depend_on_the_hosts(pictures, tmp_path, many, monkeypatch):
    """Three hosts do not divide it. Other modes load what was trained on."""
    changes = dict(train__batch_size=24)
    config = config_of(pictures, **changes)
    images = build.load_training_images(config)
    assert images.num_shards == 8 and len(images) == 40
    assert build.load_images(config).record == images.record

    def on(host):
        own = config_of(pictures, **changes, data__cache_dir=str(tmp_path / str(host)))
        return build.load_training_images(own)

    of_hosts = on_hosts(monkeypatch, 3, on)
    assert all(own.record == images.record and own.num_shards == 8 for own in of_hosts)
    assert [len(own) for own in of_hosts] == [15, 20, 15]  # the shards 0 to 2, 2 to 5, and 5 to 7


def test_hosts_compare_the_number_of_shards_that_they_choose(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(autoconfig, 'WHOLE', 39 * 8 * 8)
    monkeypatch.setattr(autoconfig, 'PICTURES_OF_SHARD', 5)

    def on(host):
        own = fill(tmp_path / str(host), {f'{i:02d}.png': PNG[i] for i in range(40 - host)})
        return build.load_training_images(config_of(own, data__cache_dir=str(tmp_path / 'cache' / str(host))))

    for error in on_hosts(monkeypatch, 2, on):
        assert isinstance(error, RunError) and 'config.data.shards' in str(error)


def test_a_few_images_are_not_divided_unless_asked(pictures):
    record = build.load_training_images(config_of(pictures)).record
    assert record == build.load_training_images(config_of(pictures, data__shards=1)).record
    assert record['sha256'] == hashlib.sha256(IMAGES[IN_ORDER].tobytes()).hexdigest()


def test_a_run_keeps_the_number_of_shards_that_was_chosen(pictures, tmp_path, many, monkeypatch, capsys):
    """Also if fewer would now be chosen: for another batch, or because the images are not many any more."""

    def begin(**changes):
        config = quick(
            {'data.source': f'folder:{pictures}'} | {key.replace('__', '.'): v for key, v in changes.items()}
        )
        with pytest.raises(RunError, match='enough'):
            train.run(config, str(tmp_path / 'run'))
        return workdir.read_config(str(tmp_path / 'run'))

    def stop(*_, **__):
        raise RunError('enough')

    monkeypatch.setattr(train, 'feed', stop)
    stored = begin()
    assert stored['data']['shards'] == 8 and len(stored['images']['counts']) == 8
    assert '40 pictures; chosen: data.shards=8' in capsys.readouterr().out
    monkeypatch.setattr(autoconfig, 'WHOLE', 10**9)
    assert begin(train__batch_size=8)['images'] == stored['images']
    with pytest.raises(RunError, match=r'train.batch_size is 4, which data.shards=8 cannot divide evenly'):
        train.run(quick({'data.source': f'folder:{pictures}', 'train.batch_size': 4}), str(tmp_path / 'run'))


def test_shards_that_do_not_divide_the_batch_are_refused(pictures):
    with pytest.raises(RunError, match=r'config.train.batch_size is 16, which data.shards=3 cannot divide evenly'):
        train.require_shards(config_of(pictures, data__shards=3))


def test_a_host_that_has_only_its_own_images_cannot_put_all_on_the_devices(pictures, monkeypatch):
    config = config_of(pictures, data__placement='device', data__shards=2)
    exp, images = build.build(config), build.load_images(config)
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(RunError, match=r'data.shards=2 each of 2 hosts has only its own images'):
        train.feed(config, exp, images, 0)


def test_a_part_of_a_batch_larger_than_a_shard_is_an_error(pictures):
    """Otherwise a batch would have an image twice."""
    config = config_of(pictures, data__shards=2, train__batch_size=32)
    images = build.load_images(config)
    train.require_enough(config, images)
    fewer = dataclasses.replace(images, record=images.record | {'counts': [24, 15], 'count': 39})
    with pytest.raises(RunError, match=r'16 images from each of data.shards=2, but one has only 15'):
        train.require_enough(config, fewer)


def test_hosts_compare_pictures_and_preprocessing_before_they_decode(pictures, monkeypatch):
    compared = {}

    def differ(values, advice):
        compared.update(values)
        raise RunError('the hosts differ')

    monkeypatch.setattr(build, 'require_same', differ)
    monkeypatch.setattr(data, 'decode', lambda *_, **__: pytest.fail('pictures are decoded'))
    with pytest.raises(RunError, match='the hosts differ'):
        build.load_training_images(config_of(pictures, data__shards=2))
    digest = data.open_pictures(f'folder:{pictures}', 'train').sha256_everywhere
    assert compared['config.data.source'] == f'40 pictures whose names and sizes have SHA-256 {digest}'
    assert PIL.__version__ in compared['the preprocessing']


def test_only_the_split_that_is_trained_on_is_divided(tmp_path):
    """A held-out split may have fewer pictures than there are shards."""
    files = {f'train/{i:02d}.png': PNG[i] for i in range(20)} | {f'test/{i}.png': PNG[i] for i in range(3)}
    config = config_of(fill(tmp_path / 'split', files), data__shards=4)
    assert [len(build.load_images(config, split).shards) for split in ('', 'train', 'test')] == [4, 4, 0]


def test_the_number_of_shards_belongs_to_a_run(pictures, tmp_path):
    """It decides which images are in a batch."""
    config = config_of(pictures, data__shards=2)
    workdir.write_config(config, str(tmp_path / 'run'), build.load_images(config))
    with pytest.raises(RunError, match=r'config.data.shards: 2 there, 4 asked'):
        workdir.check_config(config_of(pictures, data__shards=4), str(tmp_path / 'run'))


def test_invalid_placements_are_named(pictures):
    for changes, words in [
        (dict(data__placement='gpu'), "config.data.placement is 'gpu'"),
        (dict(data__placement='device', data__cache=False), 'config.data.cache=False'),
    ]:
        config = config_of(pictures, **changes)
        with pytest.raises(RunError, match=re.escape(words)):
            next(train.feed(config, build.build(config), build.load_images(config), 0))


class Affine:
    """A network that compiles quickly: scale·x_t + shift, with dropout-like noise."""

    def init(self, key):
        return {'shift': 0.3 * jax.random.normal(key, (8, 8, 1)), 'scale': jnp.float32(-0.5)}

    def net(self, params, *, dropout_key=None):
        return lambda x_t, t: params['scale'] * x_t + params['shift'] + 0.1 * jax.random.normal(dropout_key, x_t.shape)


@pytest.mark.slow
def test_training_does_not_depend_on_the_placement(pictures):
    """Bit by bit: images on the device; on the host, from the cache; decoded for each batch, and resumed."""
    ends, step_fns = [], {}
    initial = None
    for changes, starts in [
        (dict(data__placement='device'), (0,)),
        (dict(data__placement='host'), (0,)),
        (dict(data__cache=False), (0, 3)),
    ]:
        config = config_of(pictures, **changes, data__flip=True, train__num_steps=5, model__implementation='plain')
        exp = dataclasses.replace(build.build(config), network=Affine())
        initial = initial or jax.jit(exp.init)(jax.random.key(0))
        state = jax.tree.map(lambda leaf: leaf.copy(), initial)
        images = build.load_images(config)
        for start, stop in zip(starts, (*starts[1:], 5), strict=True):
            batches = train.feed(config, exp, images, start)
            for _ in range(start, stop):
                batch = next(batches)
                placed = batch[1] is None
                step_fns[placed] = step_fns.get(placed) or train.compile_step(config, exp, state, *batch)
                state, _ = step_fns[placed](state, *batch)
        ends.append({str(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)})
    assert len(step_fns) == 2
    for end in ends[1:]:
        assert_bitwise(end, ends[0])
    for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(initial.params), strict=True):
        assert not np.array_equal(one, other)


# Refused before anything is compiled.


def test_a_batch_larger_than_the_data_is_an_error(pictures, tmp_path):
    with pytest.raises(RunError, match=r'config.train.batch_size is 48, but there are only 40 images'):
        train.run(config_of(pictures, train__batch_size=48), str(tmp_path / 'run'))
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_other_images_are_refused_with_their_numbers(pictures, tmp_path):
    """The same images in another folder are accepted; one more, or another, is not."""
    config = config_of(pictures)
    workdir.write_config(config, str(tmp_path / 'run'), build.load_images(config))
    moved = config_of(pictures.rename(tmp_path / 'moved'), data__cache=False, data__placement='host')
    workdir.check_config(moved, str(tmp_path / 'run'), build.load_images(moved))
    fill(tmp_path / 'moved', {'a/00.png': PNG[1]})
    with pytest.raises(RunError, match=r'the images: 40, preprocessing \w+ there; 40, '):
        workdir.check_config(moved, str(tmp_path / 'run'), build.load_images(moved))
    fill(tmp_path / 'moved', {'a/00.png': PNG[0], 'a/more.png': PNG[0]})
    with pytest.raises(RunError) as error:
        train.run(moved, str(tmp_path / 'run'))
    for words in ('the images: 40, preprocessing', '41, preprocessing', str(tmp_path / 'moved'), str(tmp_path / 'run')):
        assert words in str(error.value)


def test_config_json_stores_class_names_in_any_script(tmp_path):
    """Even one that is not valid Unicode."""
    for name in (b'\xe7\x8c\xab', b'caf\xe9'):
        folder = os.fsencode(tmp_path / 'p') + b'/' + name
        os.makedirs(folder)
        with open(folder + b'/1.png', 'wb') as file:
            file.write(PNG[0])
    config = config_of(tmp_path / 'p')
    workdir.write_config(config, str(tmp_path / 'run'), build.load_images(config))
    stored = workdir.read_config(str(tmp_path / 'run'))
    assert stored['images']['classes'] == ['caf\udce9', '猫']


# At the command line.


@pytest.mark.slow
def test_celeba_trains_from_tfds_without_tensorflow(tmp_path):
    """Two steps of configs/celeba.py with a small network."""
    pictures = [encoded(image, 'jpeg') for image in noise(6, 218, 178, 3)]
    examples = {'train': [(picture, None) for picture in pictures]}
    write_tfds(tmp_path / 'tfds', 'celeb_a', examples, image=picture_feature('218', '178'), version='2.1.0')
    assert celeba.get_config().data.source == 'tfds:celeb_a'
    changes = TINY | {'train.num_steps': 2, 'train.batch_size': 4, 'data.data_dir': tmp_path / 'tfds'}
    changes |= {'data.image_size': 16, 'model.num_blocks': 1, 'model.implementation': 'plain'}  # compile quickly
    code = (
        'import runpy, sys\n'
        'try:\n    runpy.run_path("main.py", run_name="__main__")\n'
        'finally:\n    print("imported", sorted({"tensorflow", "torch", "keras"} & set(sys.modules)))'
    )
    arguments = ['--config=configs/celeba.py', f'--workdir={tmp_path / "run"}', '--config.data.placement=host']
    done = subprocess.run(
        [sys.executable, '-c', code, *arguments, *(f'--config.{key}={value}' for key, value in changes.items())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert '6 images of tfds:celeb_a' in done.stdout and 'complete: 2 steps' in done.stdout
    assert done.stdout.splitlines()[-1] == 'imported []'
    assert saved(tmp_path / 'run') == [2]


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_decoding_ends_in_one_line(pictures, tmp_path, number):
    """With status 75, without a traceback, and without files of an unfinished cache.

    Their removal takes longer here than the decoding that fails without them.
    """
    code = (
        'import runpy, shutil, sys, time\n'
        'rmtree = shutil.rmtree\n'
        'shutil.rmtree = lambda *args, **kwargs: (rmtree(*args, **kwargs), time.sleep(2))\n'
        'from diffusion.data import pictures\n'
        'decode = pictures.decode\n'
        'pictures.decode = lambda content: (time.sleep(0.2), decode(content))[1]\n'
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
    assert 'Traceback' not in errors and 'interrupted: ' in errors.splitlines()[-1]
    assert [path.suffix for path in kept.iterdir()] == ['.lock']
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_missing_dataset_is_an_error_in_a_few_lines(tmp_path):
    done = main('--config=configs/celeba.py', f'--workdir={tmp_path / "run"}', f'--config.data.data_dir={tmp_path}')
    assert_refused(done, f'{tmp_path}/celeb_a', 'make prepare DATASET=celeb_a', '--config.data.source=folder:')
    assert [line.split()[0] for line in done.stdout.splitlines()] == ['loading', 'devices:']
    assert len(done.stderr.splitlines()) == 4
