"""What a config leaves open: found out from the pictures, said, and kept."""

import collections
import functools
import importlib
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from configs import default, folder
from diffusion import experiment
from diffusion.data.pictures import CROPS
from diffusion.experiment import RunError
from tests.galleries import encoded, fill, noise
from tests.test_data_pictures import ROOT

NAMES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem not in ('__init__', 'workdir'))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def config_of(pictures, **changes):
    config = folder.get_config()
    config.data.source = f'folder:{pictures}'
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return config


def noisy(*shapes, seed=0):
    return {f'{i:03d}.png': encoded(noise(1, *shape, seed=seed + i)[0]) for i, shape in enumerate(shapes)}


@functools.cache
def _num_params(model, images):
    network = experiment.make_network(ConfigDict(json.loads(model)), ConfigDict(json.loads(images)))
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0))))


def num_params(config):
    """Of the network that a config describes; it is not made, but for its shapes, and once for all that share it."""
    images = {key: config.data[key] for key in ('image_size', 'channels')}
    return _num_params(json.dumps(config.model.to_dict()), json.dumps(images))


def assert_works(config):
    """The network takes an image of this size and answers one like it; a block less a size is quicker and no other."""
    config.model.num_blocks = 1
    network = experiment.make_network(config.model, config.data)
    params = jax.eval_shape(network.init, jax.random.key(0))
    size, channels = config.data.image_size, config.data.channels
    image = jax.ShapeDtypeStruct((2, size, size, channels), np.float32)
    levels = jax.ShapeDtypeStruct((2,), np.int32)
    assert jax.eval_shape(lambda p, x, t: network.net(p)(x, t), params, image, levels).shape == image.shape


# A size for pictures of these sizes.


@given(st.integers(1, 200), st.integers(1, 50))
def test_pictures_that_are_small_squares_are_taken_as_they_are(size, count):
    chosen = experiment.chosen_size(collections.Counter({(size, size): count}))
    if size <= 64 and size % 4 == 0:
        assert chosen == size
    else:
        assert chosen <= min(size, 64) and 2 * chosen > min(size, 64) and chosen & (chosen - 1) == 0


@settings(max_examples=60)
@given(
    st.dictionaries(st.tuples(st.integers(1, 500), st.integers(1, 500)), st.integers(1, 300), min_size=2, max_size=6)
)
def test_of_mixed_pictures_99_of_100_are_large_enough(sizes):
    """And no power of two up to 64 that is larger would do."""
    chosen = experiment.chosen_size(collections.Counter(sizes))
    total = sum(sizes.values())

    def too_small(size):
        return sum(count for shape, count in sizes.items() if min(shape) < size)

    assert chosen in (1, 2, 4, 8, 16, 32, 64)
    assert too_small(chosen) <= 0.01 * total
    assert chosen == 64 or too_small(2 * chosen) >= 0.01 * total


# A network for a size.


def test_the_keys_of_a_choice_are_told():
    assert set(experiment.CHOSEN) == set(experiment.chosen_network(8, 0)) <= set(default.get_config().model)


@pytest.mark.parametrize('size', [1, 2, 3, 7, 12, 28, 30, 50, 64])
def test_a_network_is_chosen_for_any_size(size):
    """Halved while it can be, to 8 pixels or fewer; attention at 16 pixels or fewer, where there is such a size."""
    config = default.get_config()
    config.data.image_size = size
    config.model.update(experiment.chosen_network(size, 1000))
    assert_works(config)
    smallest = size >> (len(config.model.multipliers) - 1)
    assert smallest <= 8 or smallest % 2 or size > 128
    sizes = [size >> i for i in range(len(config.model.multipliers))]
    assert set(config.model.attention_resolutions) <= {s for s in sizes if s <= 16}
    assert bool(config.model.attention_resolutions) == (min(sizes) <= 16)


def test_a_network_is_wider_where_there_is_an_accelerator(monkeypatch):
    widths = [experiment.chosen_network(32, 100)['channels']]
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    for num_images in (100, 50_000):
        chosen = experiment.chosen_network(32, num_images)
        assert chosen['channels'] % chosen['groups'] == 0
        widths.append(chosen['channels'])
    assert widths == sorted(set(widths))


# The whole of it.


def test_what_is_found_out_is_said_and_the_rest_is_left(tmp_path, capsys):
    pictures = fill(tmp_path / 'p', noisy(*[(24, 24, 3)] * 3, (24, 24)))
    asked = config_of(pictures)
    config = experiment.resolve(asked, str(tmp_path / 'run'))
    assert (config.data.image_size, config.data.channels) == (24, 3)  # one of them is grey
    said = capsys.readouterr().out
    for words in ('4 pictures', 'data.image_size=24', 'data.channels=3', f'model.channels={config.model.channels}'):
        assert words in said
    assert asked.data.image_size == 0  # is not changed
    assert not (tmp_path / 'run').exists()
    chosen = {'image_size', 'channels', 'multipliers', 'num_blocks', 'attention_resolutions', 'groups'}
    for part, keys in asked.to_dict().items():
        if isinstance(keys, dict):
            assert {key for key in keys if keys[key] != config[part][key]} <= chosen


def test_grey_pictures_are_grey_also_in_colour(tmp_path):
    """As many a scan is stored: three channels, all the same."""
    grey = noise(1, 16, 16)[0]
    pictures = fill(tmp_path / 'p', {'1.png': encoded(grey), '2.png': encoded(np.repeat(grey[..., None], 3, -1))})
    assert experiment.resolve(config_of(pictures), str(tmp_path / 'run')).data.channels == 1


def test_mixed_sizes_are_cut_and_shrunk(tmp_path):
    pictures = fill(tmp_path / 'p', noisy((20, 50, 3), (90, 33, 3), (40, 40)))
    config = experiment.resolve(config_of(pictures), str(tmp_path / 'run'))
    assert config.data.image_size == 16
    assert experiment.load_images(config).images.shape == (3, 16, 16, 3)


@pytest.mark.parametrize(
    'changes',
    [
        dict(data__image_size=8),
        dict(data__channels=1),
        dict(model__channels=16, model__groups=8, model__multipliers=(1,)),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_chosen_by_hand_is_kept(tmp_path, changes):
    pictures = fill(tmp_path / 'p', noisy((24, 24, 3), (24, 24, 3)))
    config = experiment.resolve(config_of(pictures, **changes), str(tmp_path / 'run'))
    flat = {f'{part}__{key}': value for part in ('data', 'model') for key, value in config[part].items()}
    assert {key: flat[key] for key in changes} == changes
    assert config.data.image_size and config.data.channels and config.model.channels


def test_later_runs_keep_the_first_ones_choices(tmp_path, monkeypatch, capsys):
    """Also with pictures that would have led to others, on another machine; so that the run can be sampled."""
    pictures = fill(tmp_path / 'p', noisy((24, 24, 3)))
    workdir = str(tmp_path / 'run')
    first = experiment.resolve(config_of(pictures), workdir)
    experiment.remember_config(first, workdir)
    capsys.readouterr()
    fill(pictures, noisy((12, 12), (13, 40)))
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    again = experiment.resolve(config_of(pictures), workdir)
    assert json.dumps(again.to_dict()) == json.dumps(first.to_dict())
    assert capsys.readouterr().out == ''
    experiment.check_config(again, workdir)
    other = experiment.resolve(config_of(pictures, data__image_size=12), workdir)
    with pytest.raises(RunError, match=r'config.data.image_size: 24 there, 12 asked'):
        experiment.check_config(other, workdir)


def test_pictures_that_are_none_are_listed(tmp_path):
    pictures = fill(tmp_path / 'p', {'a.png': b'', 'b.jpg': b'text'})
    with pytest.raises(RunError, match=r'none of the 2 pictures') as error:
        experiment.resolve(config_of(pictures), str(tmp_path / 'run'))
    assert "'a.png' is empty" in str(error.value) and "'b.jpg' is no picture" in str(error.value)


# Compiled programs.


@pytest.fixture
def programs():
    """JAX keeps no programs at first, and what it kept before, in the end. Yields (hits, a function that compiles)."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    hits = []

    def keep(folder, seconds):
        jax.config.update('jax_compilation_cache_dir', folder)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', seconds)
        compilation_cache.reset_cache()

    def listen(event, **_):
        if event == '/jax/compilation_cache/cache_hits':
            hits.append(event)

    def compiled(name):
        def program(x):
            return 2 * x + 1

        program.__name__ = name
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)  # one that is so small would not be kept
        assert jax.jit(program).lower(1.0).compile()(1.0) == 3

    keep(None, 0)
    jax.monitoring.register_event_listener(listen)
    yield hits, compiled
    jax.monitoring.unregister_event_listener(listen)
    keep(*before)


def kept_in(folder):
    return {path.name for path in folder.rglob('*-cache')}


def test_compiled_programs_are_found_again(tmp_path, programs):
    """In the workdir, or a folder that is named; also where something was compiled before."""
    hits, compiled = programs
    config = default.get_config()
    compiled('before')
    for asked, where in [('workdir', tmp_path / 'run' / 'compiled'), (str(tmp_path / 'shared'), tmp_path / 'shared')]:
        config.compile_cache = asked
        experiment.keep_programs(config, str(tmp_path / 'run'))
        compiled('after')
        assert not hits
        (name,) = kept_in(where)
        assert 'after' in name
        compiled('after')
        assert hits.pop() and not hits and kept_in(where) == {name}


def test_compiled_programs_are_not_kept_where_that_is_off(tmp_path, programs):
    hits, compiled = programs
    config = default.get_config()
    config.compile_cache = 'off'
    experiment.keep_programs(config, str(tmp_path / 'run'))
    compiled('once')
    compiled('once')
    assert not hits and not kept_in(tmp_path)


# A config.json that is damaged.

IMAGES = {'count': 3, 'fingerprint': 'f', 'sha256': 's', 'channel_means': [1.0, 2.0, 3.0]}


@pytest.mark.parametrize(
    ('part', 'value'),
    [
        ('images', 'x'),
        ('images', {'a': 1}),
        ('images', IMAGES | {'channel_means': ['x']}),
        ('train', 5),
        ('changes', 'x'),
        ('data', []),
        ('data', {}),
        ('data', {'image_size': 'x', 'channels': 3}),
        ('model', None),
        ('model', {}),
    ],
)
def test_a_damaged_config_is_named(tmp_path, part, value):
    """By any of those who read it; and one that says nothing of images, as of a run that was imported, is not."""
    config = config_of(tmp_path / 'none')
    path = tmp_path / 'config.json'
    whole = config.to_dict() | {'data': {'image_size': 8, 'channels': 3}, 'model': experiment.chosen_network(8, 0)}
    path.write_text(json.dumps(whole))
    assert experiment.resolve(config, str(tmp_path)).data.image_size == 8
    path.write_text(json.dumps(whole | {'images': IMAGES}))
    assert experiment.resolve(config, str(tmp_path)).data.image_size == 8
    path.write_text(json.dumps(whole | {part: value}))
    with pytest.raises(RunError, match=r'config.json cannot be read .*: restore it, or choose another --workdir'):
        experiment.resolve(config, str(tmp_path))


# The configs.


@pytest.mark.parametrize('name', NAMES)
def test_each_config_is_one(name):
    """It builds, has no key of its own, and its docstring gives the command, and the number of parameters it has."""
    module = importlib.import_module(f'configs.{name}')
    config = module.get_config()
    reference = default.get_config()
    assert {p: set(v) if hasattr(v, 'items') else 0 for p, v in config.items()} == {
        p: set(v) if hasattr(v, 'items') else 0 for p, v in reference.items()
    }
    if name == 'folder':
        config.data.update(image_size=32, channels=3)
        config.model.update(experiment.chosen_network(32, 1000))
    experiment.check(config)
    experiment.make_schedule(config.schedule)
    experiment.make_optimizer(config.train)
    size = num_params(config)
    assert config.data.crop in CROPS and config.data.placement == 'auto'
    if name != 'default':
        assert f'--config=configs/{name}.py' in module.__doc__ and '--workdir=' in module.__doc__
    if 'parameters' in module.__doc__:
        assert f'{size:,} parameters' in module.__doc__
    if config.data.source.startswith('tfds:') and name not in ('default', 'celeba', 'cifar10'):
        assert f'make prepare DATASET={config.data.source[5:]}' in module.__doc__


def test_there_is_a_config_for_each_dataset():
    wanted = {'celeba', 'cifar10', 'mnist', 'lsun_church', 'lsun_bedroom', 'ffhq', 'imagenet64', 'folder', 'digits'}
    assert wanted <= set(NAMES)


def test_variances_are_those_of_the_authors_code():
    """Ho et al. draw with β in run_cifar.py, and with the posterior variance in run_lsun.py and run_celebahq.py."""
    names = ('cifar10', 'lsun_church', 'lsun_bedroom', 'ffhq')
    variances = [importlib.import_module(f'configs.{name}').get_config().sample.variance for name in names]
    assert variances == ['large', 'small', 'small', 'small']
