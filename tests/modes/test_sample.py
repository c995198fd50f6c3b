"""--mode=sample: what it writes and prints, and that an image depends on its seed and index alone."""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion import build, data, sampler, schedule, workdir
from diffusion.data import to_float
from diffusion.metrics import frechet
from diffusion.modes import evaluate, sample
from diffusion.util import RunError, numerics
from tests.galleries import encoded, fill, noise
from tests.runs import QUICK, ROOT, flags, make_run, quick, random_params

SAMPLE = {'sample.num_images': 5, 'sample.num_steps': 3, 'sample.batch_size': 5, 'sample.eta': 1.0}


def asking(**changes):
    """A config that asks for five images in three steps; the names of `changes` are keys of config.sample."""
    return quick(SAMPLE | {f'sample.{key}': value for key, value in changes.items()})


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A workdir with a checkpoint of step 12."""
    config = asking()
    params, ema = random_params(config, 1), random_params(config, 2)
    return make_run(tmp_path_factory.mktemp('run'), config, 12, params=params, ema=ema)


def draw(path, config):
    """Run --mode=sample. Returns the images, the record and the one folder that it wrote, which is then moved away."""
    assert sample.run(config, str(path)) == 0
    (folder,) = (written for written in (path / 'samples').iterdir() if written.name != 'progress')
    folder = folder.rename(path / f'{len(list(path.iterdir()))}-{folder.name}')
    with np.load(folder / 'samples.npz') as arrays:
        assert arrays.files == ['arr_0']
        return arrays['arr_0'], json.loads((folder / 'record.json').read_text(encoding='utf-8')), folder


@pytest.fixture(scope='module')
def five(trained):
    """Five images of DDPM: with noise at each step."""
    return draw(trained, asking())


def test_images_a_grid_and_a_record_are_written(five):
    images, _, folder = five
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 5
    assert images.std() > 10
    written = sorted(path.name for path in folder.iterdir())
    assert written == ['grid.png', 'influences.npz', 'record.json', 'samples.npz']
    with Image.open(folder / 'grid.png') as picture:
        grid = np.asarray(picture)
    corners = []
    for image in images:
        enlarged = image[:, :, 0].repeat(6, 0).repeat(6, 1)  # to 48 pixels
        there = (np.lib.stride_tricks.sliding_window_view(grid, enlarged.shape) == enlarged).all((2, 3))
        ((top, left),) = np.argwhere(there)
        corners.append((int(top), int(left)))
    tops, lefts = (sorted(set(side)) for side in zip(*corners, strict=True))
    assert corners == [(top, left) for top in tops for left in lefts][:5]  # row by row
    assert (len(tops), len(lefts)) == (2, 3) and min(np.diff(tops).min(), np.diff(lefts).min()) > 48


def test_the_record_describes_the_images(five):
    _, record, folder = five
    expected = {
        'checkpoint_step': 12,
        'weights': 'ema',
        'eta': 1.0,
        'num_steps': 3,
        'spacing': 'trailing',
        'variance': 'small',
        'clip': True,
        'seed': 0,
        'count': 5,
    }
    assert {key: record[key] for key in expected} == expected
    assert record['wall_seconds'] > 0
    assert record['versions']['python'] == platform.python_version()
    for package in ('jax', 'flax', 'numpy'):
        assert record['versions'][package] == importlib.metadata.version(package)
    assert record['model']['kind'] == 'eps' and len(record['params_sha256']) == 64
    assert record['schedule']['T'] == 4 and record['schedule']['name'] == 'linear'
    signal_at_T = np.sqrt(np.prod(1 - np.linspace(0.1, 0.5, 4)))  # the β of the tiny config
    assert record['schedule']['signal_at_T'] == record['signal_at_start'] == pytest.approx(signal_at_T)
    for fact in ('step12', 'ema', 'eta1', '3trailing', 'small'):
        assert fact in folder.name


def distances(record):
    """The value of each metric, by its name."""
    return {entry['name']: entry['value'] for entry in record['metrics']}


def test_the_distance_is_that_of_the_written_images(five):
    images, record, _ = five
    real = build.load_images(asking()).images
    expected = frechet.distance(*(frechet.moments([part / 127.5 - 1]) for part in (images, real)))
    (entry,) = record['metrics']
    assert entry['value'] == pytest.approx(expected, rel=1e-4) and entry['name'] == 'FD-pixels'
    assert entry['n'] == 5 and entry['standard_error'] > 0
    assert entry['reference']['count'] == 1498 and entry['reference']['source'] == 'digits'
    assert 'weights' in record['left_out']['FID']


def test_a_record_that_would_lose_a_metric_is_replaced_with_a_word(trained, tmp_path, capsys):
    for metrics, says in ((('FD-pixels', 'recall-pixels'), False), (('FD-pixels',), True), (('FD-pixels',), False)):
        capsys.readouterr()
        assert sample.run(asking(metrics=metrics, folder=str(tmp_path)), str(trained)) == 0
        told = 'replaces one that also has recall-pixels (pixels, [-1,1])' in capsys.readouterr().out
        assert told == says


def test_the_reason_is_recorded_where_there_is_no_distance(trained):
    _, one, _ = draw(trained, asking(num_images=1))
    assert one['metrics'] == [] and 'at least 2 vectors' in one['left_out']['FD-pixels']
    config = asking()
    config.data.source = 'folder:/nowhere'
    _, absent, _ = draw(trained, config)
    assert absent['metrics'] == [] and 'nowhere' in absent['left_out']['FD-pixels']
    plan = evaluate.prepare(asking(), (64, 64, 3))
    assert '12288' in plan.left_out['FD-pixels'] and '4096' in plan.left_out['FD-pixels']


def test_the_distance_is_from_the_training_images_only(tmp_path, monkeypatch, capsys):
    """There is one from a copy of them in another folder, and none from other images of the same size."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    config = asking()
    own = {f'{i}.png': encoded(image) for i, image in enumerate(noise(4, 8, 8, 1))}
    config.data.source = f'folder:{fill(tmp_path / "own", own)}'
    run, params = tmp_path / 'run', random_params(config, 1)
    make_run(run, config, 1, params=params, ema=params)
    workdir.write_config(config, str(run), build.load_images(config))
    config.data.source = f'folder:{fill(tmp_path / "copy", own)}'
    assert distances(draw(run, config)[1])['FD-pixels'] > 0
    others = {f'{i}.png': encoded(image) for i, image in enumerate(noise(5, 8, 8, 1, seed=1))}
    config.data.source = f'folder:{fill(tmp_path / "others", others)}'
    capsys.readouterr()
    why = draw(run, config)[1]['left_out']['FD-pixels']
    assert why in capsys.readouterr().out
    for words in ('5 images', str(tmp_path / 'others'), 'not the 4 that the run was trained on'):
        assert words in why


def test_copies_of_training_images_are_found_and_drawn(trained, capsys, monkeypatch):
    """A sampler that returns training images, but for one that it has made up."""
    real = build.load_images(asking()).images
    made_up = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    planted = np.concatenate([real[[7, 700]], made_up, real[[70]]])
    monkeypatch.setattr(sample, 'make_sampler', lambda *_, **__: lambda params, seed, start, stop: to_float(planted))
    config = asking(num_images=4, metrics=('FD-pixels',))
    config.metrics.memorization = True
    _, record, folder = draw(trained, config)
    (entry,) = record['memorization']
    assert sorted(entry['copies']) == [0, 1, 3]
    closest = {pair['sample']: pair['training_image'] for pair in entry['closest']}
    assert len(closest) == 4 and (closest[0], closest[1], closest[3]) == (7, 700, 70)
    assert entry['median_distance_held_out'] > 0
    with Image.open(folder / 'closest-pixels.png') as picture:
        pixels = np.asarray(picture)
    assert (pixels[4:52, 4:52] == pixels[56:104, 4:52]).all()  # a sample above the training image that it is
    assert 'warning: 3 samples are copies of training images (pixels)' in capsys.readouterr().out


@pytest.fixture
def drawing_fails(monkeypatch):
    """The test fails if images are drawn."""
    monkeypatch.setattr(sample, 'make_sampler', lambda *_, **__: pytest.fail('images are drawn'))


def test_a_workdir_in_which_samples_cannot_be_written_is_refused_before_they_are_drawn(trained, drawing_fails):
    (trained / 'samples').rename(trained / 'before')
    (trained / 'samples').write_text('not a folder')
    with pytest.raises(RunError, match=r'run.*/samples cannot be written .*--workdir'):
        sample.run(asking(), str(trained))
    (trained / 'samples').unlink()
    (trained / 'before').rename(trained / 'samples')


def test_a_failed_write_at_the_end_is_reported_in_one_line(trained, five):
    """As on a disk that fills up while images are drawn: here a folder has the name of the file."""
    name = five[2].name.partition('-')[2]
    in_the_way = trained / 'samples' / name / 'record.json.new'
    in_the_way.mkdir(parents=True)
    with pytest.raises(RunError, match=rf'{name} cannot be written .*free some space'):
        sample.run(asking(), str(trained))
    in_the_way.parent.rename(trained / 'given-up')


def test_an_impossible_chain_is_refused_before_the_checkpoint_is_read(trained, monkeypatch):
    monkeypatch.setattr(workdir, 'load_params', lambda *_: pytest.fail('a checkpoint is read'))
    with pytest.raises(RunError, match=r'config.sample: num_steps is 5.*T=4'):
        sample.run(asking(num_steps=5), str(trained))


def test_reading_parameters_does_not_move_the_compile_cache(trained):
    config = asking()
    before = jax.config.jax_compilation_cache_dir
    config.compile_cache = str(trained / 'elsewhere')
    workdir.load_params(build.build(config).abstract_state(), config, str(trained), 'ema')
    assert jax.config.jax_compilation_cache_dir == before


def test_two_processes_do_not_draw_the_same_images(tmp_path):
    images = np.zeros((2, 4, 4, 1), np.uint8)
    first, second = (sample.Drawn(str(tmp_path), (4, 4, 1), '0' * 64) for _ in range(2))
    first.append(0, images)
    with pytest.raises(RunError, match='another process is drawing'):
        second.append(0, images)  # after the first
    with open(tmp_path / f'drawn-{"0" * 16}.bin', 'ab') as file, pytest.raises(RunError, match='another process'):
        fcntl.flock(file, fcntl.LOCK_EX)  # while the first adds some
        second.append(2, images)
    assert first.count() == 2


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_a_signal_while_images_are_drawn_keeps_them_and_the_same_command_resumes(
    trained, number, tmp_path, monkeypatch
):
    """The images, their order and the metrics are those of an unbroken run."""
    count = 5000 if number == signal.SIGKILL else 1_000_000
    asked = flags(trained, QUICK, sample__num_images=count, sample__batch_size=8, sample__num_steps=4)
    with open(tmp_path / 'errors', 'w', encoding='utf-8') as errors:
        command = [sys.executable, 'main.py', *asked, '--mode=sample']
        process = subprocess.Popen(command, cwd=ROOT, stdout=errors, stderr=errors)
    try:
        deadline = time.monotonic() + 120
        while not any(file.stat().st_size >= 8 * 64 for file in trained.glob(f'samples/*-n{count}-*/drawn-*.bin')):
            printed = (tmp_path / 'errors').read_text()
            assert process.poll() is None and time.monotonic() < deadline, printed
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == (-9 if number == signal.SIGKILL else 75)
    finally:
        process.kill()
    printed = (tmp_path / 'errors').read_text()
    assert 'Traceback' not in printed
    (partial,) = trained.glob(f'samples/*-n{count}-*/drawn-*.bin')
    kept = partial.stat().st_size // 64
    assert 8 <= kept < count
    if number != signal.SIGKILL:
        assert f'{kept} of {count} images are drawn and kept; the same command resumes' in printed
        shutil.rmtree(partial.parent)
        return
    with open(partial, 'ab') as file:
        file.write(b'a part of an image')
    config = asking(num_images=count, batch_size=500, num_steps=4, eta=0.0)
    starts, make = [], sample.make_sampler

    def recorded(*args, **kwargs):
        drawn = make(*args, **kwargs)
        return lambda params, seed, start, stop: [starts.append(start), drawn(params, seed, start, stop)][1]

    monkeypatch.setattr(sample, 'make_sampler', recorded)
    resumed, fresh = draw(trained, config), draw(trained, config)
    assert starts[0] == kept and starts.count(0) == 1  # the second run alone begins at the first image
    np.testing.assert_array_equal(resumed[0], fresh[0])
    assert resumed[1]['metrics'] == fresh[1]['metrics']


def test_two_processes_do_not_draw_the_same_images_at_once(tmp_path):
    """The one that comes second notices, and nothing is mixed up."""
    first, second = (sample.Drawn(str(tmp_path), (8, 8, 1), 'settings') for _ in range(2))
    first.append(0, np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(RunError, match='another process is drawing'):
        second.append(0, np.ones((2, 8, 8, 1), np.uint8))
    assert first.count() == 2 and not first.images().any()


def test_images_are_on_disk_before_they_are_counted(tmp_path, monkeypatch):
    """What a crash of the machine leaves is what the progress bar said."""
    synced = []
    monkeypatch.setattr(os, 'fsync', lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    drawn = sample.Drawn(str(tmp_path), (8, 8, 1), 'settings')
    for start in (0, 2):
        drawn.append(start, np.zeros((2, 8, 8, 1), np.uint8))
    assert synced == [2 * 64, 4 * 64]


def test_an_image_depends_on_its_seed_and_index_alone(trained, five):
    """Not on how many are drawn, nor on how many at a time."""
    images, record, _ = draw(trained, asking(num_images=3, batch_size=2))
    assert record['count'] == len(images) == 3
    np.testing.assert_array_equal(images, five[0][:3])


def test_a_run_that_can_only_be_read_is_sampled_elsewhere_with_each_image_in_a_file(trained, five, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob('*')}
    config = asking(folder=str(tmp_path / 'out'), png=True, step=12)
    assert sample.run(config, str(trained)) == 0
    assert {path: path.stat().st_mtime_ns for path in trained.rglob('*')} == before
    (folder,) = (tmp_path / 'out').iterdir()
    assert folder.name == five[2].name.partition('-')[2]
    paths = sorted((folder / 'png').iterdir())
    assert [path.name for path in paths] == [f'{i:06d}.png' for i in range(5)]
    for path, image in zip(paths, five[0], strict=True):
        with Image.open(path) as picture:
            assert picture.mode == 'L'
            np.testing.assert_array_equal(picture, image[:, :, 0])
    record = json.loads((folder / 'record.json').read_text())
    assert str(tmp_path) not in json.dumps(record)  # records are passed on


def test_the_record_has_the_settings_of_jax_that_change_numbers(trained, five, monkeypatch):
    """And the flags of XLA, but for those that do not change numbers."""
    monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=/tmp --xla_cpu_enable_fast_math=true')
    with jax.default_matmul_precision('highest'), jax.numpy_dtype_promotion('strict'):
        found = numerics()
    assert found['jax_default_matmul_precision'] == 'highest' and found['jax_numpy_dtype_promotion'] == 'strict'
    assert found['jax_enable_x64'] is False and found['jax_threefry_partitionable'] is True
    assert found['XLA_FLAGS'] == ['--xla_cpu_enable_fast_math=true']
    assert five[1]['numerics'].keys() >= found.keys() - {'XLA_FLAGS'} and five[1]['implementation'] == 'cpu'


def test_one_program_draws_any_images_of_any_seed(trained, five):
    config = asking()
    exp = build.build(config)
    _, params = workdir.load_params(exp.abstract_state(), config, str(trained), 'ema')
    draw_floats = sample.make_sampler(
        exp,
        params,
        (8, 8, 1),
        batch_size=3,
        timesteps=schedule.timesteps(4, 3),
        kind='eps',
        eta=1.0,
    )

    def images(*which):
        return data.to_uint8(draw_floats(params, *which))

    np.testing.assert_array_equal(images(0, 0, 3), five[0][:3])
    np.testing.assert_array_equal(images(0, 3, 5), five[0][3:])
    others = images(1, 0, 3)
    assert not any((one == other).all() for one in others for other in five[0])


def test_the_weights_that_are_asked_for_are_used(tmp_path):
    """A network that returns x̂_0 = 0.5 everywhere draws the grey level 191.25; −0.5 is 63.75."""
    config = quick(SAMPLE | {'model.kind': 'x0', 'sample.eta': 0.0})
    nothing = jax.tree.map(np.zeros_like, random_params(config, 0))
    params, ema = (nothing | {'conv_out': nothing['conv_out'] | {'bias': np.float32([b])}} for b in (-0.5, 0.5))
    make_run(tmp_path, config, 1, params=params, ema=ema)
    folders = []
    for weights, grey in (('ema', 191), ('raw', 64)):
        config.sample.weights = weights
        images, record, folder = draw(tmp_path, config)
        np.testing.assert_array_equal(images, np.full((5, 8, 8, 1), grey))
        assert record['weights'] == weights
        assert weights in folder.name
        folders.append(folder.name.partition('-')[2])
    assert folders[0] != folders[1]  # neither overwrites the other


@pytest.mark.slow
@pytest.mark.parametrize(
    ('key', 'value'), [('eta', 0.0), ('clip', False), ('variance', 'large'), ('spacing', 'leading')]
)
def test_each_setting_makes_other_images_in_a_folder_of_their_own(trained, five, key, value):
    images, record, folder = draw(trained, asking(**{key: value}))
    ours, theirs = record, five[1]
    assert record[key] == value
    assert {name for name in ours if ours[name] != theirs[name]} <= {
        key,
        'first_level',
        'signal_at_start',
        'metrics',
        'wall_seconds',
        'compile_seconds',
    }
    assert folder.name.partition('-')[2] != five[2].name.partition('-')[2]
    assert (images != five[0]).any()


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'spacing': 'even'}, ('spacing', "'even'", 'trailing', 'quad')),
        ({'eta': 1.5}, ('eta', '1.5')),
        ({'eta': -0.1}, ('eta', '-0.1')),
        ({'variance': 'huge'}, ('variance', "'huge'", 'small', 'large')),
        ({'variance': 'large', 'eta': 0.0}, ('variance', 'eta=0')),
        ({'variance': 'large', 'eta': 0.5}, ('variance', 'eta=0.5', "variance 'small'", 'eta=1')),
        ({'num_steps': 5}, ('num_steps', '5', 'T=4')),
        ({'num_steps': 0}, ('num_steps', '0')),
        ({'num_images': 0}, ('num_images', '0')),
        ({'batch_size': 0}, ('batch_size', '0')),
        ({'weights': 'average'}, ('weights', "'average'", 'ema', 'raw')),
        ({'seed': -1}, ('seed', '-1')),
        ({'compat': 'Ho'}, ('compat', "'Ho'", "'ho'", "'diffusers'")),
        ({'rule': 'euler'}, ('rule', "'euler'", "'kernel'")),
    ],
)
def test_a_wrong_sample_setting_is_named(trained, changes, words):
    before = sorted(trained.iterdir())
    with pytest.raises(RunError) as error:
        sample.run(asking(**changes), str(trained))
    for word in ('config.sample', *words):
        assert word in str(error.value)
    assert sorted(trained.iterdir()) == before


def test_a_sampler_rule_of_the_table_is_used_and_named(trained, five, monkeypatch):
    """The rule that jumps to x̂_0 at once; its images are others, in a folder with its name."""

    def jump(state, x_t, t, s, std, *, schedule, predict, noise, eta):
        return state, predict(x_t, t).x0

    monkeypatch.setitem(sampler.RULES, 'jump', sampler.Rule(init=lambda x_T: (), step=jump))
    images, record, folder = draw(trained, asking(rule='jump'))
    assert record['rule'] == 'jump' and 'jump' in folder.name
    assert (images != five[0]).any()


def test_a_run_of_another_network_is_refused(trained):
    config = asking()
    config.model.channels = 16
    with pytest.raises(RunError, match=r'config\.model\.channels: 8 there, 16 asked'):
        sample.run(config, str(trained))


def test_a_workdir_without_a_checkpoint_is_refused_and_left_alone(tmp_path):
    with pytest.raises(RunError, match=r'no run in .*empty'):
        sample.run(asking(), str(tmp_path / 'empty'))
    assert not (tmp_path / 'empty').exists()
    (tmp_path / 'begun' / 'checkpoints').mkdir(parents=True)
    with pytest.raises(RunError, match=r'no complete checkpoint in .*begun'):
        sample.run(asking(), str(tmp_path / 'begun'))
