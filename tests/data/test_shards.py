"""Images that are divided into shards. A host loads only some of them."""

import hashlib
import itertools
import json
import os

import numpy as np
import pytest

from diffusion import data
from diffusion.data.pictures import Preprocessing
from diffusion.data.sources.files import Files
from tests.galleries import encoded, fill, noise, write_tfds, zipped

COUNT = 23
PICTURES = noise(COUNT, 8, 8, 3)


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures in two classes."""
    files = {f'{"ab"[i % 2]}/{i:02d}.png': encoded(picture) for i, picture in enumerate(PICTURES)}
    return fill(tmp_path / 'pictures', files)


def load(path, directory, **changes):
    arguments = {'image_size': 8, 'channels': 3, 'cache_dir': str(directory)} | changes
    return data.load(f'folder:{path}', **arguments)


@pytest.mark.parametrize('keep', [True, False])
def test_shards_are_the_images_of_one_array(pictures, tmp_path, keep):
    whole = load(pictures, tmp_path / 'cache')
    shards = load(pictures, tmp_path / 'cache', num_shards=4, cache=keep)
    assert [len(shard) for shard in shards.shards] == [5, 6, 6, 6]
    assert len(shards) == COUNT and shards.images.shape == (COUNT, 8, 8, 3)
    assert shards.images.nbytes == whole.images.nbytes
    np.testing.assert_array_equal(shards[:], whole[:])
    np.testing.assert_array_equal(shards.labels, whole.labels)
    rows = np.array([[22, 0, 5], [4, 5, 11]])
    np.testing.assert_array_equal(shards[rows], whole[rows])
    np.testing.assert_array_equal(shards[7], whole[7])
    np.testing.assert_array_equal(shards[-3:], whole[-3:])


def test_the_record_describes_all_shards(pictures, tmp_path):
    """Count and means are those of all images; the digest is of the shards' digests, which anybody can compute."""
    whole = load(pictures, tmp_path / 'cache').record
    shards = load(pictures, tmp_path / 'cache', num_shards=4)
    record = shards.record
    assert record['count'] == COUNT and record['classes'] == whole['classes'] == ['a', 'b']
    np.testing.assert_allclose(record['channel_means'], whole['channel_means'], rtol=1e-12)
    bounds = (0, 5, 11, 17, 23)
    digests = [hashlib.sha256(shards[i:j].tobytes()).hexdigest() for i, j in itertools.pairwise(bounds)]
    assert record['sha256'] == hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    assert record['counts'] == [5, 6, 6, 6]


def test_a_host_reads_and_keeps_only_its_own_pictures(pictures, tmp_path, monkeypatch):
    read, original = set(), Files.picture

    def counted(self, file, max_pixels):
        read.add(file.name[-6:-4])
        return original(self, file, max_pixels)

    monkeypatch.setattr(Files, 'picture', counted)
    names = sorted(os.path.join(at, name) for at, _, files in os.walk(pictures) for name in files)
    preprocess = Preprocessing('', 8, 3)
    opened = data.open_pictures(f'folder:{pictures}', 'train')
    own = data.decode(opened, preprocess, cache_dir=str(tmp_path / 'cache'), num_shards=4, shards=range(2, 4))
    assert read == {name[-6:-4] for name in names[11:]}
    assert sum(file.stat().st_size for file in (tmp_path / 'cache').glob('*/images.bin')) == 12 * 8 * 8 * 3
    np.testing.assert_array_equal(own[:], load(pictures, tmp_path / 'other')[11:])
    read.clear()
    load(pictures, tmp_path / 'cache', num_shards=4)  # on one host, later: the others are decoded now
    assert read == {name[-6:-4] for name in names[:11]}


def test_labels_have_a_digest_of_all_shards(pictures, tmp_path):
    shards = data.labelled(load(pictures, tmp_path / 'cache', num_shards=2), 2)
    digests = [data.labels_sha256(['a', 'b'], part) for part in (shards.labels[:11], shards.labels[11:])]
    assert shards.record['labels_sha256'] == hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def test_the_digest_of_the_pictures_ignores_times_and_notices_sizes(pictures, tmp_path):
    """Copies on two hosts have other times of modification."""

    def digest():
        return data.open_pictures(f'folder:{pictures}', 'train').sha256_everywhere

    first = digest()
    picture = pictures / 'a' / '00.png'
    os.utime(picture, (1, 1))
    assert digest() == first
    picture.write_bytes(encoded(PICTURES[0]) + b'more')
    assert digest() != first


def test_the_digest_of_a_zip_file_has_the_checksums_of_its_pictures(tmp_path):
    """Of equally long contents."""

    def digest(name, content):
        files = {f'{i}.png': encoded(PICTURES[0]) for i in range(3)} | {'3.png': content}
        path = zipped(tmp_path / f'{name}.zip', files)
        return data.open_pictures(f'folder:{path}', 'train').sha256_everywhere

    picture = encoded(PICTURES[0])
    assert digest('one', picture) == digest('two', picture) != digest('three', picture[:-1] + b'x')


def test_shards_of_a_tfds_dataset(tmp_path):
    write_tfds(
        tmp_path, 'shapes', {'train': [(encoded(picture), 0) for picture in PICTURES]}, classes=['one'], shards=2
    )
    arguments = {'image_size': 8, 'channels': 3, 'data_dir': str(tmp_path), 'cache_dir': str(tmp_path / 'cache')}
    shards = data.load('tfds:shapes', num_shards=3, **arguments)
    np.testing.assert_array_equal(shards[:], PICTURES)
    assert len(shards.shards) == 3 and (shards.labels == 0).all()


def test_names_of_pictures_in_a_later_shard_are_right(pictures, tmp_path, capsys):
    (pictures / 'b' / '21.png').write_bytes(b'no picture')
    images = load(pictures, tmp_path / 'cache', num_shards=2, max_bad_fraction=0.1)
    assert len(images) == COUNT - 1 and [len(shard) for shard in images.shards] == [11, 11]
    (listed,) = [file for file in (tmp_path / 'cache').glob('*/bad.txt') if file.stat().st_size]
    assert listed.read_text().startswith('b/21.png ')
    assert '1 of 12 pictures cannot be used' in capsys.readouterr().out


def test_unusable_pictures_are_counted_over_all_shards(pictures, tmp_path):
    """One of 23 is more than 4 %, but less than 5 %, wherever it is."""
    (pictures / 'b' / '21.png').write_bytes(b'no picture')
    assert len(load(pictures, tmp_path / 'cache', num_shards=5, max_bad_fraction=0.05)) == COUNT - 1
    with pytest.raises(ValueError, match=r'1 of 23 .* data.max_bad_fraction=0.04: .* --config.*max_bad_fraction=0.044'):
        load(pictures, tmp_path / 'cache', num_shards=5, max_bad_fraction=0.04)


def test_more_shards_than_pictures_are_an_error(pictures, tmp_path):
    with pytest.raises(ValueError, match=r'^23 pictures cannot be divided into data.shards=24: use fewer shards'):
        load(pictures, tmp_path / 'cache', num_shards=24)
