"""What a config leaves open is chosen from the pictures, printed, and kept."""

import collections
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion import autoconfig, build, workdir
from diffusion.configs import default, folder
from diffusion.networks import NETWORKS
from diffusion.util import RunError
from tests.galleries import encoded, fill, noise
from tests.runs import dotted, quick


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def config_of(pictures, **changes):
    config = folder.get_config()
    config.data.source = f'folder:{pictures}'
    config.update_from_flattened_dict(dotted(changes))
    return config


def resolve(tmp_path, pictures, **changes):
    return workdir.resolve(config_of(pictures, **changes), str(tmp_path / 'run'))


def noisy(*shapes, seed=0):
    return {f'{i:03d}.png': encoded(noise(1, *shape, seed=seed + i)[0]) for i, shape in enumerate(shapes)}


def assert_works(config):
    """The network returns an image of the size that it takes; it has one block per resolution here, to be quick."""
    config.model.num_blocks = 1
    network = build.make_network(config, NETWORKS)
    params = jax.eval_shape(network.init, jax.random.key(0))
    size, channels = config.data.image_size, config.data.channels
    image = jax.ShapeDtypeStruct((2, size, size, channels), np.float32)
    levels = jax.ShapeDtypeStruct((2,), np.int32)
    assert jax.eval_shape(lambda p, x, t: network.net(p)(x, t), params, image, levels).shape == image.shape


# The image size.


@given(st.integers(1, 200), st.integers(1, 50))
def test_small_square_pictures_keep_their_size(size, count):
    chosen = autoconfig.choose_size(collections.Counter({(size, size): count}))
    if size <= 64 and size % 4 == 0:
        assert chosen == size
    else:
        assert chosen <= min(size, 64) and 2 * chosen > min(size, 64) and chosen & (chosen - 1) == 0


@given(
    st.dictionaries(st.tuples(st.integers(1, 500), st.integers(1, 500)), st.integers(1, 300), min_size=2, max_size=6)
)
def test_99_of_100_mixed_pictures_reach_the_chosen_size(sizes):
    """They do not reach the next power of two up to 64. Of fewer than 100, one may be smaller; and so may outliers."""
    chosen = autoconfig.choose_size(collections.Counter(sizes))
    total = sum(sizes.values())
    shorter = np.sort(np.repeat([min(size) for size in sizes], list(sizes.values())))
    odd = (shorter < np.quantile(shorter, 0.5, method='lower') / 4).sum()
    odd = 0 if odd > max(1, total / 20) else odd
    few = max(0.01 * (total - odd), total - odd >= 20)

    def too_small(size):
        return (shorter < size).sum()

    assert too_small(chosen) <= odd + few
    if chosen in (1, 2, 4, 8, 16, 32, 64):
        assert chosen == 64 or too_small(2 * chosen) >= odd + 0.01 * (total - odd)
    else:
        assert sizes[chosen, chosen] >= total - odd - few


@pytest.mark.parametrize('count', [4, 18, 60, 99, 200, 5000])
@pytest.mark.parametrize('odd', [(1, 1), (3, 500), (30, 30)])
def test_one_odd_picture_does_not_decide_the_size(count, odd):
    """One of few pictures does not count if it is far smaller; one of 20 or more, in any case."""
    chosen = autoconfig.choose_size(collections.Counter({(96, 128): count, odd: 1}))
    assert chosen == (64 if odd != (30, 30) or count > 19 else 16)


def test_one_odd_picture_does_not_change_the_size_of_equal_squares():
    for odd in ((1, 1), (27, 28), (30, 30), (500, 28)):
        assert autoconfig.choose_size(collections.Counter({(28, 28): 60, odd: 1})) == 28
    assert autoconfig.choose_size(collections.Counter({(28, 28): 60, (30, 30): 30})) == 16


def test_pictures_that_are_too_small_are_left_out_of_training_and_of_later_commands(tmp_path, capsys):
    """A pixel among photos, as web pages have them. The photos are all used."""
    pictures = fill(tmp_path / 'p', noisy(*[(12, 16, 3)] * 30) | {'pixel.gif': encoded(noise(1, 1, 1)[0], 'gif')})
    config = resolve(tmp_path, pictures)
    assert config.data.image_size == 8
    printed = capsys.readouterr().out
    assert '1 of 31 pictures are left out, because they are smaller than 8×8 (1×1)' in printed
    assert build.load_images(config).images.shape == (30, 8, 8, 3)
    workdir.write_config(config, str(tmp_path / 'run'))
    assert len(build.load_images(resolve(tmp_path, pictures))) == 30


def test_pictures_of_very_different_sizes_are_asked_for_by_name(tmp_path):
    """A tenth of them are single pixels: they do not decide, and they are not left out without a question."""
    pictures = fill(tmp_path / 'p', noisy(*[(24, 24, 3)] * 27, *[(1, 1, 3)] * 3))
    with pytest.raises(RunError, match=r'3 of 30 .*--config.data.image_size=16 --config.data.max_bad_fraction=0.1'):
        resolve(tmp_path, pictures)
    config = resolve(tmp_path, pictures, data__image_size=16, data__max_bad_fraction=0.1)
    assert len(build.load_images(config)) == 27


# The network.


def test_a_choice_has_the_keys_that_are_announced():
    assert set(autoconfig.CHOSEN) == set(autoconfig.choose_network(8, 0, 'cpu')) <= set(default.get_config().model)


@pytest.mark.parametrize('size', [1, 2, 3, 7, 12, 28, 30, 50, 64])
def test_a_network_is_chosen_for_any_size(size):
    """It halves the image while it can, to 8 pixels or fewer, and has attention at a size of at most 16, if any."""
    config = default.get_config()
    config.data.image_size = size
    config.model.update(autoconfig.choose_network(size, 1000, 'cpu'))
    assert_works(config)
    smallest = size >> (len(config.model.multipliers) - 1)
    assert smallest <= 8 or smallest % 2 or size > 128
    sizes = [size >> i for i in range(len(config.model.multipliers))]
    assert set(config.model.attention_resolutions) <= {s for s in sizes if s <= 16}
    assert bool(config.model.attention_resolutions) == (min(sizes) <= 16)


def test_a_network_is_wider_on_an_accelerator():
    widths = [autoconfig.choose_network(32, 100, 'cpu')['channels']]
    for num_images in (100, 50_000):
        chosen = autoconfig.choose_network(32, num_images, 'gpu')
        assert chosen['channels'] % chosen['groups'] == 0
        widths.append(chosen['channels'])
    assert widths == sorted(set(widths))


# The shards.


@pytest.mark.parametrize(
    ('count', 'size', 'batch', 'shards'),
    [
        (60_000, 32, 128, 1),  # 0.2 GB
        (162_770, 64, 128, 1),  # CelebA, 2 GB
        (1_281_167, 64, 128, 64),  # ImageNet, 16 GB
        (3_033_042, 256, 64, 64),  # LSUN bedrooms, 596 GB
        (3_033_042, 256, 96, 32),
        (3_033_042, 256, 9, 1),
        (1000, 4096, 64, 8),  # 50 GB
        (199, 4096, 64, 1),  # 10 GB
    ],
)
def test_many_images_are_divided_into_shards(count, size, batch, shards):
    """Not those of less than 8 GB, and none into shards of fewer than 100 pictures."""
    config = default.get_config()
    config.data.image_size, config.train.batch_size = size, batch
    assert autoconfig.choose_shards(config, count) == shards
    config.data.placement = 'device'
    assert autoconfig.choose_shards(config, count) == 1


# A whole config.


def test_choices_are_printed_and_nothing_else_changes(tmp_path, capsys):
    pictures = fill(tmp_path / 'p', noisy(*[(24, 24, 3)] * 3, (24, 24)))
    asked = config_of(pictures)
    config = workdir.resolve(asked, str(tmp_path / 'run'))
    assert (config.data.image_size, config.data.channels) == (24, 3)  # one of them is grey
    printed = capsys.readouterr().out
    for words in ('4 pictures', 'data.image_size=24', 'data.channels=3', f'model.channels={config.model.channels}'):
        assert words in printed
    assert asked.data.image_size == 0
    assert not (tmp_path / 'run').exists()
    chosen = {'image_size', 'channels', 'multipliers', 'num_blocks', 'attention_resolutions', 'groups'}
    for part, keys in asked.to_dict().items():
        if isinstance(keys, dict):
            assert {key for key in keys if keys[key] != config[part][key]} <= chosen


def test_the_network_is_that_for_the_devices_that_are_planned_for(tmp_path):
    """Not for those of the machine that plans, which is a CPU here: it is twice as wide."""
    asked = config_of(fill(tmp_path / 'p', noisy((24, 24, 3))))
    widths = [workdir.resolve(asked, str(tmp_path), platform=name).model.channels for name in ('cpu', 'gpu')]
    assert widths[1] == 2 * widths[0]


def test_grey_pictures_with_three_channels_are_grey(tmp_path):
    """As many scans are stored: all channels are the same."""
    grey = noise(1, 16, 16)[0]
    pictures = fill(tmp_path / 'p', {'1.png': encoded(grey), '2.png': encoded(np.repeat(grey[..., None], 3, -1))})
    assert resolve(tmp_path, pictures).data.channels == 1


def test_one_picture_in_colour_among_grey_ones_is_said(tmp_path, capsys):
    pictures = fill(tmp_path / 'p', noisy(*[(8, 8)] * 20, (8, 8, 3)))
    assert resolve(tmp_path, pictures).data.channels == 3
    assert 'only 1 of 21 pictures have colour; --config.data.channels=1' in capsys.readouterr().out


def test_pictures_of_mixed_sizes_are_cropped_and_resized(tmp_path):
    pictures = fill(tmp_path / 'p', noisy((20, 50, 3), (90, 33, 3), (40, 40)))
    config = resolve(tmp_path, pictures)
    assert config.data.image_size == 16
    assert build.load_images(config).images.shape == (3, 16, 16, 3)


@pytest.mark.parametrize(
    'changes',
    [
        dict(data__image_size=8),
        dict(data__channels=1),
        dict(model__channels=16, model__groups=8, model__multipliers=(1,)),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_choices_by_hand_are_kept(tmp_path, changes):
    pictures = fill(tmp_path / 'p', noisy((24, 24, 3), (24, 24, 3)))
    config = resolve(tmp_path, pictures, **changes)
    flat = {f'{part}__{key}': value for part in ('data', 'model') for key, value in config[part].items()}
    assert {key: flat[key] for key in changes} == changes
    assert config.data.image_size and config.data.channels and config.model.channels


def test_keys_of_the_command_line_are_kept_beside_what_is_chosen(tmp_path):
    pictures = fill(tmp_path / 'p', noisy((24, 24, 3)))
    config = config_of(pictures, model__num_blocks=4, model__multipliers=(1, 3))
    config.command.overrides = ('model.multipliers', 'model.num_blocks', 'model.channels')
    chosen = workdir.resolve(config, str(tmp_path / 'run'))
    assert (chosen.model.num_blocks, tuple(chosen.model.multipliers)) == (4, (1, 3))
    assert chosen.model.channels == 32 and chosen.model.groups == 8


def test_later_commands_keep_the_choices_of_the_first(tmp_path, monkeypatch, capsys):
    """Also if the pictures or the machine would now lead to others; so the run can be sampled."""
    pictures = fill(tmp_path / 'p', noisy((24, 24, 3)))
    path = str(tmp_path / 'run')
    first = resolve(tmp_path, pictures)
    workdir.write_config(first, path)
    capsys.readouterr()
    fill(pictures, noisy((12, 12), (13, 40)))
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    again = resolve(tmp_path, pictures)
    assert json.dumps(again.to_dict()) == json.dumps(first.to_dict())
    assert capsys.readouterr().out == ''
    workdir.check_config(again, path)
    other = resolve(tmp_path, pictures, data__image_size=12)
    with pytest.raises(RunError, match=r'config.data.image_size: 24 there, 12 asked'):
        workdir.check_config(other, path)


def test_files_that_are_not_pictures_are_listed(tmp_path):
    pictures = fill(tmp_path / 'p', {'a.png': b'', 'b.jpg': b'text'})
    with pytest.raises(RunError, match=r'config.data: none of 2 pictures') as error:
        resolve(tmp_path, pictures)
    assert "'a.png' is empty" in str(error.value) and "'b.jpg' is not a picture" in str(error.value)


def test_small_pictures_are_allowed_beside_those_that_cannot_be_decoded(capsys):
    """One in ten is too small; the two in a hundred that may be damaged stay allowed."""
    config = quick({'data.image_size': 16, 'data.max_bad_fraction': 0.02})
    autoconfig.leave_out(config, collections.Counter({(16, 16): 90, (8, 4): 10}))
    assert config.data.max_bad_fraction == pytest.approx(0.12)
    assert '10 of 100 pictures are left out' in capsys.readouterr().out
