"""A look at a sample of the pictures of a source."""

import numpy as np
import pytest

from diffusion import data
from diffusion.data.sources import SOURCES, Source
from tests.galleries import encoded, fill, noise


def test_sizes_and_colours_are_those_before_preprocessing(tmp_path):
    grey = noise(1, 20, 30)[0]
    pictures = {'1.png': grey, '2.png': np.repeat(grey[..., None], 3, axis=-1), '3.png': noise(1, 16, 16, 3)[0]}
    root = fill(tmp_path / 'p', {name: encoded(picture) for name, picture in pictures.items()} | {'4.png': b''})
    found = data.survey(f'folder:{root}')
    assert (found.count, found.seen, found.grey, found.images) == (4, 4, 2, None)
    assert found.sizes == {(20, 30): 2, (16, 16): 1}
    assert found.bad == [('4.png', 'is empty')]

    found = data.survey(f'folder:{root}', image_size=18, channels=1, crop='center')
    assert found.images.shape == (2, 18, 18, 1) and found.images.dtype == np.uint8
    assert found.sizes == {(20, 30): 2, (16, 16): 1} and found.grey == 2
    assert [name for name, _ in found.bad] == ['3.png', '4.png'] and 'image_size=18' in found.bad[0][1]


def test_images_are_those_that_training_loads(tmp_path):
    options = {'image_size': 9, 'channels': 3, 'crop': 'center'}
    root = fill(tmp_path / 'p', {f'{i}.jpg': encoded(image, 'jpeg') for i, image in enumerate(noise(5, 20, 26, 3))})
    found = data.survey(f'folder:{root}', **options)
    loaded = data.load(f'folder:{root}', **options, cache_dir=str(tmp_path / 'cache'))
    np.testing.assert_array_equal(found.images, loaded.images)


def test_the_digits_have_8_by_8_grey_pixels():
    found = data.survey('digits')
    assert found.count == 1498 and found.sizes == {(8, 8): found.seen} and found.grey == found.seen and not found.bad


def test_the_sample_is_evenly_spaced_and_each_picture_is_read_once(monkeypatch):
    reads = []

    def read(i):
        reads.append(i)
        return np.zeros((8, 8, 1), np.uint8)

    monkeypatch.setitem(SOURCES, 'many', lambda place, split, data_dir: Source(range(100_000), read, 'many'))
    found = data.survey('many')
    assert found.count == 100_000 and found.seen == len(reads) == len(set(reads)) == 1000
    assert min(reads) == 0 and max(reads) == 99_999 and np.ptp(np.diff(sorted(reads))) <= 1


def test_invalid_requests_are_errors():
    with pytest.raises(ValueError, match='crop'):
        data.survey('digits', image_size=8, channels=1, crop='centre')
    with pytest.raises(ValueError, match='digits, folder, tfds'):
        data.survey('photos')
