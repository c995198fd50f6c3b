"""--mode=sample: what it writes, what it says of it, and that an image is the same in any company."""

import importlib.metadata
import json
import platform
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion import data, experiment, generate, schedule
from diffusion.experiment import RunError
from diffusion.metrics import frechet
from tests.galleries import encoded, fill, noise
from tests.test_main import ROOT
from tests.test_train import tiny

SAMPLE = {'sample.num_images': 5, 'sample.num_steps': 3, 'sample.batch_size': 5, 'sample.eta': 1.0}


def asking(**changes):
    """A tiny config that asks for five images in three steps; the keys of `changes` are those of config.sample."""
    return tiny(SAMPLE | {f'sample.{key}': value for key, value in changes.items()})


def make_run(workdir, config, step, **trees):
    """The folder of a run whose checkpoint holds these trees: training would leave the same."""
    experiment.remember_config(config, str(workdir))
    with experiment.open_checkpoints(config, str(workdir)) as checkpoints:
        checkpoints.save(step, **trees)
    return workdir


def random_params(config, seed):
    """Large enough that the network's answer matters; a fresh network would answer 0."""
    rng = np.random.default_rng(seed)
    abstract = experiment.build(config).abstract_state().params
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), abstract)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    config = asking()
    params, ema = random_params(config, 1), random_params(config, 2)
    return make_run(tmp_path_factory.mktemp('run'), config, 12, params=params, ema=ema)


def draw(workdir, config):
    """Run --mode=sample. Returns the images, the record and the one folder that it wrote, moved out of the way."""
    assert generate.run(config, str(workdir)) == 0
    (folder,) = (path for path in (workdir / 'samples').iterdir() if path.name != 'progress')
    folder = folder.rename(workdir / f'{len(list(workdir.iterdir()))}-{folder.name}')
    with np.load(folder / 'samples.npz') as arrays:
        assert arrays.files == ['arr_0']
        return arrays['arr_0'], json.loads((folder / 'record.json').read_text(encoding='utf-8')), folder


@pytest.fixture(scope='module')
def five(workdir):
    """Five images of DDPM: with noise at each step."""
    return draw(workdir, asking())


def test_images_a_grid_and_a_record_are_written(five):
    images, _, folder = five
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 5
    assert images.std() > 10
    assert sorted(path.name for path in folder.iterdir()) == ['grid.png', 'record.json', 'samples.npz']
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


def test_the_record_holds_what_was_done(five):
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
    for fact in ('step12', 'ema', 'eta1', '3trailing', 'small'):
        assert fact in folder.name


def test_the_distance_is_that_of_the_images_written(five):
    images, record, _ = five
    real = data.digits('train').images
    expected = frechet.distance(frechet.moments(images / 127.5 - 1), frechet.moments(real / 127.5 - 1))
    assert record['quality']['value'] == pytest.approx(expected, rel=1e-4)
    assert 'no FID' in record['quality']['metric'] and 'pixels' in record['quality']['metric']
    assert '1498' in record['quality']['reference'] and 'digits' in record['quality']['reference']


def test_where_there_is_no_distance_it_says_why():
    one = generate.distance_from_data(asking(), np.zeros((1, 8, 8, 1), np.uint8), None)
    assert one['value'] is None and 'one image' in one['why']
    large = generate.distance_from_data(asking(), np.zeros((4, 64, 64, 3), np.uint8), None)
    assert large['value'] is None and '12288' in large['why'] and '4096' in large['why']
    nowhere = tiny({'data.source': 'nowhere'})
    absent = generate.distance_from_data(nowhere, np.zeros((4, 8, 8, 1), np.uint8), None)
    assert absent['value'] is None and 'nowhere' in absent['why']


def test_other_images_are_not_taken_for_those_of_the_run(tmp_path, monkeypatch, capsys):
    """Of the same size, in another folder: no distance from them. From those of the run, also in another place, one."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    config = asking()
    own = {f'{i}.png': encoded(image) for i, image in enumerate(noise(4, 8, 8, 1))}
    config.data.source = f'folder:{fill(tmp_path / "own", own)}'
    run, params = tmp_path / 'run', random_params(config, 1)
    make_run(run, config, 1, params=params, ema=params)
    experiment.remember_config(config, str(run), experiment.load_images(config))
    config.data.source = f'folder:{fill(tmp_path / "copy", own)}'
    assert draw(run, config)[1]['quality']['value'] > 0
    others = {f'{i}.png': encoded(image) for i, image in enumerate(noise(5, 8, 8, 1, seed=1))}
    config.data.source = f'folder:{fill(tmp_path / "others", others)}'
    capsys.readouterr()
    quality = draw(run, config)[1]['quality']
    assert quality['value'] is None and quality['why'] in capsys.readouterr().out
    for words in ('5 images', str(tmp_path / 'others'), 'not the 4 that the run was trained on'):
        assert words in quality['why']


@pytest.fixture
def at_once(monkeypatch):
    """Nothing is computed."""
    monkeypatch.setattr(generate, 'make_sampler', lambda *_, **__: pytest.fail('images are drawn'))


def test_a_workdir_that_takes_no_samples_is_refused_before_they_are_drawn(workdir, at_once):
    (workdir / 'samples').rename(workdir / 'before')
    (workdir / 'samples').write_text('not a folder')
    with pytest.raises(RunError, match=r'run.*/samples cannot be written to .*--workdir'):
        generate.run(asking(), str(workdir))
    (workdir / 'samples').unlink()
    (workdir / 'before').rename(workdir / 'samples')


def test_what_cannot_be_written_at_the_end_is_one_line(workdir, five):
    """As a disk that fills up while images are drawn: here a folder lies where a file would."""
    name = five[2].name.partition('-')[2]
    in_the_way = workdir / 'samples' / name / 'record.json.new'
    in_the_way.mkdir(parents=True)
    with pytest.raises(RunError, match=rf'{name} cannot be written to .*make room'):
        generate.run(asking(), str(workdir))
    in_the_way.parent.rename(workdir / 'given-up')


def test_what_no_chain_has_is_refused_before_the_checkpoint_is_read(workdir, monkeypatch):
    monkeypatch.setattr(experiment, 'load_params', lambda *_: pytest.fail('a checkpoint is read'))
    with pytest.raises(RunError, match=r'config.sample: num_steps is 5.*T=4'):
        generate.run(asking(num_steps=5), str(workdir))


def test_the_programs_are_kept_by_who_makes_them(workdir):
    """Reading parameters changes no setting of JAX."""
    config = asking()
    before = jax.config.jax_compilation_cache_dir
    config.compile_cache = str(workdir / 'elsewhere')
    experiment.load_params(experiment.build(config), config, str(workdir), 'ema')
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_images_are_drawn_ends_it_in_one_line(workdir, number, tmp_path):
    asked = [f'--config=configs/workdir.py:{workdir}', f'--workdir={workdir}', '--mode=sample']
    asked += ['--config.sample.num_images=1000000', '--config.sample.batch_size=8', '--config.compile_cache=off']
    with open(tmp_path / 'errors', 'w', encoding='utf-8') as errors:
        process = subprocess.Popen([sys.executable, 'main.py', *asked], cwd=ROOT, stdout=errors, stderr=errors)
    try:
        deadline = time.monotonic() + 120
        while 'image/s' not in (said := (tmp_path / 'errors').read_text()) and process.poll() is None:
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()
    said = (tmp_path / 'errors').read_text()
    assert said.splitlines()[-1] == 'interrupted: nothing is written yet; the same command starts over', said
    assert 'Traceback' not in said and not list((workdir / 'samples').iterdir())


def test_an_image_is_the_same_in_any_company(workdir, five):
    """Image i follows from (seed, i), however many are drawn, and however many at a time."""
    images, record, _ = draw(workdir, asking(num_images=3, batch_size=2))
    assert record['count'] == len(images) == 3
    np.testing.assert_array_equal(images, five[0][:3])


def test_one_program_draws_any_images_of_any_seed(workdir, five):
    config = asking()
    exp = experiment.build(config)
    _, params = experiment.load_params(exp, config, str(workdir), 'ema')
    draw_floats = generate.make_sampler(
        exp,
        params,
        (8, 8, 1),
        batch_size=3,
        timesteps=schedule.timesteps(4, 3),
        kind='eps',
        eta=1.0,
    )

    def sample(*which):
        return data.to_uint8(draw_floats(params, *which))

    np.testing.assert_array_equal(sample(0, 0, 3), five[0][:3])
    np.testing.assert_array_equal(sample(0, 3, 5), five[0][3:])
    others = sample(1, 0, 3)
    assert not any((one == other).all() for one in others for other in five[0])


def test_the_average_and_the_raw_parameters_are_told_apart(tmp_path):
    """A network that answers x̂_0 = 0.5 wherever it is asked draws the grey 191.25 of its kind; −0.5 is 63.75."""
    config = tiny(SAMPLE | {'model.kind': 'x0', 'sample.eta': 0.0})
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


@pytest.mark.parametrize(
    ('key', 'value'), [('eta', 0.0), ('clip', False), ('variance', 'large'), ('spacing', 'leading')]
)
def test_each_setting_makes_other_images_in_a_folder_of_their_own(workdir, five, key, value):
    images, record, folder = draw(workdir, asking(**{key: value}))
    ours, theirs = record, five[1]
    assert record[key] == value
    assert {name for name in ours if ours[name] != theirs[name]} <= {key, 'quality', 'wall_seconds', 'compile_seconds'}
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
        ({'num_steps': 5}, ('num_steps', '5', 'T=4')),
        ({'num_steps': 0}, ('num_steps', '0')),
        ({'num_images': 0}, ('num_images', '0')),
        ({'batch_size': 0}, ('batch_size', '0')),
        ({'weights': 'average'}, ('weights', "'average'", 'ema', 'raw')),
        ({'seed': -1}, ('seed', '-1')),
        ({'compat': 'Ho'}, ('compat', "'Ho'", "'ho'", "'diffusers'")),
    ],
)
def test_a_wrong_setting_is_named(workdir, changes, words):
    before = sorted(workdir.iterdir())
    with pytest.raises(RunError) as error:
        generate.run(asking(**changes), str(workdir))
    for word in ('config.sample', *words):
        assert word in str(error.value)
    assert sorted(workdir.iterdir()) == before


def test_another_network_is_refused(workdir):
    config = asking()
    config.model.channels = 16
    with pytest.raises(RunError, match=r'config\.model\.channels: 8 there, 16 asked'):
        generate.run(config, str(workdir))


def test_without_a_checkpoint_it_says_so_and_leaves_nothing(tmp_path):
    with pytest.raises(RunError, match=r'no run in .*empty'):
        generate.run(asking(), str(tmp_path / 'empty'))
    assert not (tmp_path / 'empty').exists()
    (tmp_path / 'begun' / 'checkpoints').mkdir(parents=True)
    with pytest.raises(RunError, match=r'no complete checkpoint in .*begun'):
        generate.run(asking(), str(tmp_path / 'begun'))
