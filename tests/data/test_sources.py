"""The table of sources: the same pictures from each of them, and sources that users add."""

import hashlib

import numpy as np
import pytest

from diffusion import data
from diffusion.data.sources import SOURCES, Source, open_source
from tests.galleries import encoded, fill, noise, picture_feature, write_tfds, zipped

IMAGES = noise(12, 8, 8, 3)
PNG = [encoded(image) for image in IMAGES]
CLASSES = {f'{"test" if i % 3 == 2 else "train"}/{"cats" if i % 2 else "dogs"}/{i:02d}.png': PNG[i] for i in range(12)}


def load(source, split='train', **changes):
    return data.load(source, split, **{'image_size': 8, 'channels': 3, **changes})


def test_a_folder_a_zip_file_and_tfds_are_the_same(tmp_path):
    fill(tmp_path / 'pictures', CLASSES)
    zipped(tmp_path / 'pictures.zip', CLASSES)
    examples = {}
    for name in sorted(CLASSES):
        split, label, _ = name.split('/')
        examples.setdefault(split, []).append((CLASSES[name], ['cats', 'dogs'].index(label)))
    write_tfds(tmp_path / 'tfds', 'pets', examples, classes=['cats', 'dogs'], shards=2)

    for split, order in (('train', [1, 3, 7, 9, 0, 4, 6, 10]), ('test', [5, 11, 2, 8])):
        found = [
            load(f'folder:{tmp_path / "pictures"}', split),
            load(f'folder:{tmp_path / "pictures.zip"}', split),
            load('tfds:pets', split, data_dir=str(tmp_path / 'tfds')),
            load('tfds:pets:1.0.0', split, data_dir=str(tmp_path / 'tfds')),
        ]
        for images in found:
            np.testing.assert_array_equal(images.images, IMAGES[order])
            np.testing.assert_array_equal(images.labels, [0 if i % 2 else 1 for i in order])
            assert images.labels.dtype == np.int32
            assert images.record == found[0].record
        assert found[0].record['count'] == len(order) and found[0].record['classes'] == ['cats', 'dogs']
        np.testing.assert_allclose(found[0].record['channel_means'], IMAGES[order].mean((0, 1, 2)))


def test_celeba_is_the_same_from_a_folder_and_from_tfds(tmp_path):
    """JPEGs of 178×218 pixels: as its authors packed them, and as TFDS prepares them."""
    pictures = [encoded(image, 'jpeg') for image in noise(6, 218, 178, 3)]
    fill(tmp_path / 'celeba', {f'img_align_celeba/{i + 1:06d}.jpg': pictures[i] for i in range(6)})
    fill(tmp_path / 'celeba', {'list_attr_celeba.txt': b'6\n'})
    examples = {'train': [(picture, None) for picture in pictures], 'test': [(pictures[0], None)]}
    write_tfds(tmp_path / 'tfds', 'celeb_a', examples, image=picture_feature('218', '178'), version='2.1.0')
    options = {'image_size': 64, 'crop': 'ddim'}
    one = load(f'folder:{tmp_path / "celeba"}', **options)
    other = load('tfds:celeb_a', data_dir=str(tmp_path / 'tfds'), **options)
    assert one.images.shape == (6, 64, 64, 3)
    np.testing.assert_array_equal(one.images, other.images)
    assert one.record == other.record
    assert one.record['preprocessing']['crop'] == 'ddim'


def test_the_sha256_is_that_of_the_pixels(tmp_path):
    images = load(f'folder:{fill(tmp_path / "p", CLASSES)}')
    assert images.record['sha256'] == hashlib.sha256(np.ascontiguousarray(images.images).tobytes()).hexdigest()


@pytest.mark.parametrize('source', ['', 'floder:/x', '/pictures', 'celeb_a', 'digit'])
def test_an_unknown_source_is_named_with_those_that_exist(source):
    with pytest.raises(ValueError) as error:
        open_source(source, 'train')
    for words in (repr(source), ', '.join(SOURCES), 'NAME:PLACE', '--config.data.source=folder:/path/to/pictures'):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ('source', 'words'), [('folder', 'source=folder:/path'), ('folder:', 'source=folder:/path'), ('tfds:', 'tfds:NAME')]
)
def test_a_missing_place_is_an_error(source, words):
    with pytest.raises(ValueError, match=words):
        open_source(source, 'train')


def test_a_user_can_add_a_source(tmp_path, monkeypatch):
    """Its function gets the place, the split and data_dir. Its pictures are preprocessed and cached like others."""
    opened, reads = [], []

    def read(i):
        reads.append(i)
        if i == 2:
            raise ValueError('is missing in the database')
        return IMAGES[i]

    def mine(place, split, data_dir):
        opened.append((place, split, data_dir))
        return Source(
            names=[f'row {i}' for i in range(12)],
            read=read,
            identity=['mine', place, split],
            label=lambda i: i % 2,
            classes=['even', 'odd'],
        )

    monkeypatch.setitem(SOURCES, 'mine', mine)
    options = {'data_dir': '/data', 'cache_dir': str(tmp_path), 'max_bad_fraction': 0.1}
    for _ in range(2):
        images = load('mine:host:5432/faces', 'odd days', **options)
        good = [i for i in range(12) if i != 2]
        np.testing.assert_array_equal(images.images, IMAGES[good])
        np.testing.assert_array_equal(images.labels, np.array(good) % 2)
        assert images.record['classes'] == ['even', 'odd']
    assert opened == [('host:5432/faces', 'odd days', '/data')] * 2
    assert sorted(reads) == list(range(12))  # the second time, they come from the cache
    with pytest.raises(ValueError, match='row 2 is missing in the database'):
        load('mine', **options | {'max_bad_fraction': 0})
    assert data.survey('mine').bad == [('row 2', 'is missing in the database')]


def test_a_source_needs_only_names_pictures_and_an_identity(monkeypatch):
    monkeypatch.setitem(SOURCES, 'mine', lambda place, split, data_dir: Source('abc', lambda i: IMAGES[i], 'mine'))
    images = load('mine')
    np.testing.assert_array_equal(images.images, IMAGES[:3])
    assert images.labels is None and images.record['classes'] is None


def test_an_empty_source_is_an_error(monkeypatch):
    monkeypatch.setitem(SOURCES, 'mine', lambda place, split, data_dir: Source([], lambda i: IMAGES[i], 'empty'))
    with pytest.raises(ValueError, match="no images in 'mine'"):
        load('mine')
