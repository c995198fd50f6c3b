"""scikit-learn's digits as a source."""

import hashlib

import numpy as np
import pytest
import sklearn.datasets

from diffusion import data
from diffusion.data.sources import open_source
from tests.galleries import encoded, fill


def load(split='train', **changes):
    return data.load(**{'source': 'digits', 'split': split, 'image_size': 8, 'channels': 1, **changes})


def test_every_digit_is_in_one_split():
    train, test = load('train').images, load('test').images
    assert train.shape == (1498, 8, 8, 1) and test.shape == (299, 8, 8, 1)
    assert train.dtype == test.dtype == np.uint8
    everything = sklearn.datasets.load_digits().images.reshape(1797, 64)
    ours = np.concatenate([train, test]).reshape(1797, 64) / 255 * 16
    assert sorted(map(tuple, everything)) == sorted(map(tuple, np.round(ours)))
    assert np.abs(ours - np.round(ours)).max() <= 0.5 * 16 / 255  # levels are rounded, and nothing else


def test_every_sixth_digit_is_in_the_test_split():
    digits = sklearn.datasets.load_digits()
    for split, rows in (('test', np.arange(5, 1797, 6)), ('train', np.delete(np.arange(1797), slice(5, None, 6)))):
        images = load(split)
        np.testing.assert_array_equal(images.labels, digits.target[rows])
        np.testing.assert_array_equal(np.round(images.images[..., 0] / 255 * 16), digits.images[rows])
        assert images.record['sha256'] == hashlib.sha256(np.ascontiguousarray(images.images).tobytes()).hexdigest()


def test_the_17_levels_span_the_whole_range():
    levels = np.unique(load().images)
    assert len(levels) == 17 and levels[0] == 0 and levels[-1] == 255
    assert np.ptp(np.diff(levels.astype(int))) <= 1


def test_the_record_describes_the_digits():
    record = load().record
    assert record['count'] == 1498 and record['classes'] == [str(i) for i in range(10)]
    assert record['preprocessing']['image_size'] == 8


def test_digits_are_preprocessed_as_other_pictures(tmp_path):
    """In another size and in colour, they are the same as from a folder of files."""
    files = {f'{i:03d}.png': encoded(image) for i, image in enumerate(load('test').images)}
    folder = f'folder:{fill(tmp_path / "p", files)}'
    for changes in ({'channels': 3}, {'image_size': 4}, {'crop': 'center'}):
        np.testing.assert_array_equal(load('test', **changes).images, load(source=folder, **changes).images)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'split': 'valid'}, ("'valid'", 'train', 'test')),
        ({'crop': 'ddim'}, ('8×8', 'data.crop=ddim')),
        ({'image_size': 16}, ('8×8', 'image_size=16')),
        ({'source': 'digits:8'}, ("'digits:8'", 'no place')),
    ],
)
def test_invalid_requests_are_named(changes, words):
    with pytest.raises(ValueError) as error:
        load(**changes)
    for word in words:
        assert word in str(error.value)


def test_reading_gives_arrays_of_one_channel():
    source = open_source('digits', 'test')
    assert len(source) == 299 and source.read(298).shape == (8, 8, 1) and source.encoded is None
