"""Folders, zip files and TFDS datasets: the same pictures from each, and plain words where there are none."""

import hashlib
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from diffusion import data
from diffusion.data.sources import SUFFIXES, open_source
from tests.galleries import encoded, feature, fill, noise, picture_feature, write_tfds, zipped
from tests.test_data_pictures import ROOT

IMAGES = noise(12, 8, 8, 3)
PNG = [encoded(image) for image in IMAGES]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def load(source, split='train', **changes):
    return data.load(source, split, **{'image_size': 8, 'channels': 3, **changes})


def names(where, split='train'):
    return list(open_source(f'folder:{where}', split).names)


def refused(source, split='train', data_dir=''):
    with pytest.raises(ValueError) as error:
        open_source(source, split, data_dir)
    return str(error.value)


CLASSES = {f'{"test" if i % 3 == 2 else "train"}/{"cats" if i % 2 else "dogs"}/{i:02d}.png': PNG[i] for i in range(12)}


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


def test_the_folder_of_all_datasets_may_be_given_apart(tmp_path):
    fill(tmp_path / 'pictures', {'a.png': PNG[0]})
    assert len(load('folder:pictures', data_dir=str(tmp_path))) == 1


def test_the_sha256_is_of_the_pixels(tmp_path):
    images = load(f'folder:{fill(tmp_path / "p", CLASSES)}')
    assert images.record['sha256'] == hashlib.sha256(np.ascontiguousarray(images.images).tobytes()).hexdigest()


# Which files, in which split, of which class.


@pytest.mark.parametrize('name', ['test', 'val', 'valid', 'validation'])
@pytest.mark.parametrize('outer', ['', 'unpacked/'])
def test_held_out_pictures_are_found_under_their_names(tmp_path, name, outer):
    root = fill(tmp_path / 'p', {f'{outer}train/a.png': PNG[0], f'{outer}{name}/b.png': PNG[1]})
    assert names(root) == [f'{outer}train/a.png']
    assert names(root, 'test') == [f'{outer}{name}/b.png']
    if name != 'test':
        assert names(root, 'validation') == [f'{outer}{name}/b.png']
    else:
        assert "no split 'validation'" in refused(f'folder:{root}', 'validation')


def test_test_and_validation_are_told_apart(tmp_path):
    root = fill(tmp_path / 'p', {f'{split}/a.png': PNG[0] for split in ('train', 'valid', 'test')})
    assert [names(root, split) for split in ('train', 'validation', 'test')] == [
        ['train/a.png'],
        ['valid/a.png'],
        ['test/a.png'],
    ]


def test_without_splits_all_is_for_training(tmp_path):
    root = fill(tmp_path / 'p', {'img_align_celeba/000001.jpg': encoded(IMAGES[0], 'jpeg')})
    source = open_source(f'folder:{root}', 'train')
    assert list(source.names) == ['img_align_celeba/000001.jpg'] and source.classes is None
    message = refused(f'folder:{root}', 'test')
    assert f'no folder test/ in {root}' in message and "'train'" in message


def test_classes_are_the_same_in_each_split(tmp_path):
    """Also one that only a single split has: a number means one class."""
    files = {f'train/{c}/{c}.png': PNG[0] for c in 'bd'} | {f'test/{c}/{c}.png': PNG[0] for c in 'abd'}
    root = fill(tmp_path / 'p', files)
    for split, labels in (('train', [1, 2]), ('test', [0, 1, 2])):
        images = load(f'folder:{root}', split)
        assert images.record['classes'] == ['a', 'b', 'd']
        np.testing.assert_array_equal(images.labels, labels)


def test_a_new_class_elsewhere_renumbers_what_is_cached(tmp_path):
    root = fill(tmp_path / 'p', {'train/b/1.png': PNG[0], 'train/c/1.png': PNG[1]})
    np.testing.assert_array_equal(load(f'folder:{root}').labels, [0, 1])
    fill(root, {'test/a/1.png': PNG[2]})
    images = load(f'folder:{root}')
    np.testing.assert_array_equal(images.labels, [1, 2])
    assert images.record['classes'] == ['a', 'b', 'c']


def test_a_stray_picture_beside_classes_leaves_no_labels(tmp_path):
    """It has no class; better none than a wrong one."""
    root = fill(tmp_path / 'p', {'a/1.png': PNG[0], 'b/1.png': PNG[1], 'stray.png': PNG[2]})
    images = load(f'folder:{root}')
    assert len(images) == 3 and images.labels is None and images.record['classes'] is None


def test_order_is_by_name_and_names_may_be_in_any_script(tmp_path):
    plain = ['ångström.png', 'Ωμέγα.png', '写真/猫 1.png', '🎨.png', 'a b\nc.png', 'quote\'".png', 'UPPER.PNG']
    files = {name: PNG[i] for i, name in enumerate(plain)}
    root = fill(tmp_path / 'p', files)
    assert names(root) == sorted(plain)
    np.testing.assert_array_equal(load(f'folder:{root}').images, IMAGES[[plain.index(name) for name in sorted(plain)]])
    assert names(zipped(tmp_path / 'p.zip', files)) == sorted(plain)


def test_names_that_are_no_unicode_are_read(tmp_path):
    """And listed where the picture is bad; a class may have such a name, too."""
    folder = os.fsencode(tmp_path / 'p') + b'/\xff'
    os.makedirs(folder)
    for name, content in ((b'caf\xe9.png', PNG[0]), (b'\x80bad.png', b'')):
        with open(os.path.join(folder, name), 'wb') as file:
            file.write(content)
    fill(tmp_path / 'p', {'a/1.png': PNG[1]})
    images = load(f'folder:{tmp_path / "p"}', max_bad_fraction=0.5)
    np.testing.assert_array_equal(images.images, IMAGES[[1, 0]])
    np.testing.assert_array_equal(images.labels, [0, 1])
    (listed,) = (tmp_path / 'cache').glob('diffusion/*/bad.txt')
    assert listed.read_text().startswith('\\udcff/\\udc80bad.png is empty')


def test_links_are_followed_each_folder_once(tmp_path):
    root = fill(tmp_path / 'p', {'a/1.png': PNG[0]})
    fill(tmp_path / 'elsewhere', {'2.png': PNG[1], 'deeper/3.png': PNG[2]})
    (root / 'b').symlink_to(tmp_path / 'elsewhere')
    (root / 'a' / 'up').symlink_to(root)  # a loop
    (root / 'a' / 'self').symlink_to(root / 'a' / 'self')
    (root / 'c').symlink_to(root / 'a')  # a second way to the same
    (root / 'linked.png').symlink_to(root / 'a' / '1.png')
    assert names(root) == ['a/1.png', 'b/2.png', 'b/deeper/3.png', 'linked.png']


def test_links_to_nothing_and_to_themselves_are_bad_pictures(tmp_path):
    root = fill(tmp_path / 'p', {f'{i}.png': PNG[i] for i in range(3)})
    (root / 'nothing.png').symlink_to(root / 'gone')
    (root / 'self.png').symlink_to(root / 'self.png')
    (root / 'folder.png').mkdir()  # is none, and is no picture
    os.mkfifo(root / 'pipe.png')  # nor is what one could wait for for ever
    images = load(f'folder:{root}', max_bad_fraction=0.5)
    assert len(images) == 3
    (listed,) = (tmp_path / 'cache').glob('diffusion/*/bad.txt')
    assert [line.split()[0] for line in listed.read_text().splitlines()] == ['nothing.png', 'self.png']
    assert listed.read_text().count('cannot be read') == 2


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_what_may_not_be_read_is_left_out(tmp_path, capsys):
    root = fill(tmp_path / 'p', {'a.png': PNG[0], 'b.png': PNG[1], 'closed/c.png': PNG[2]})
    (root / 'b.png').chmod(0)
    (root / 'closed').chmod(0)
    try:
        assert len(load(f'folder:{root}', max_bad_fraction=0.5)) == 1
    finally:
        (root / 'closed').chmod(0o700)
    assert 'closed' in capsys.readouterr().out


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch, capsys):
    root = fill(tmp_path / 'p', {'a.png': PNG[0], 'closed/c.png': PNG[2]})
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == 'closed':
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    assert names(root) == ['a.png']
    assert f"'{root}/closed' cannot be read (Permission denied)" in capsys.readouterr().out


def test_hidden_files_and_other_files_are_no_pictures(tmp_path):
    """Those that file managers and archivers leave behind."""
    files = dict.fromkeys(
        ['.hidden.png', '.thumbnails/1.png', '__MACOSX/._1.png', 'a/._1.png', 'Thumbs.db', 'list.txt', 'README'], b'x'
    )
    files |= {'a/1.png': PNG[0], 'b..png': PNG[1], '__MACOSX_and_more.png': PNG[2]}
    root = fill(tmp_path / 'p', files)
    (root / 'z').symlink_to(fill(root / '.kept', {'2.png': PNG[3]}))  # by a way that is not hidden
    seen = ['__MACOSX_and_more.png', 'a/1.png', 'b..png']
    assert names(root) == [*seen, 'z/2.png']
    assert names(zipped(tmp_path / 'p.zip', files)) == seen


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_pictures_are_known_by_their_suffix(tmp_path, suffix):
    root = fill(tmp_path / 'p', {f'1{suffix}': PNG[0], f'2{suffix.upper()}': PNG[1], f'3{suffix}.part': PNG[2]})
    assert len(names(root)) == 2


# What is not there, or not whole.


def test_a_missing_folder_is_named_with_the_way_out(tmp_path):
    message = refused(f'folder:{tmp_path / "none"}')
    assert str(tmp_path / 'none') in message and '--config.data.source=folder:/path/to/pictures' in message


@pytest.mark.parametrize('source', ['', 'folder', 'folder:', 'floder:/x', 'tfds:', '/pictures', 'celeb_a'])
def test_a_wrong_source_is_named_with_the_right_ones(source):
    message = refused(source)
    for word in (repr(source), 'folder:PATH', 'tfds:NAME', "'digits'", '--config.data.source='):
        assert word in message


def test_a_file_or_an_empty_folder_is_named(tmp_path):
    fill(tmp_path, {'a.png': PNG[0], 'p/list.txt': b'', 'damaged.zip': b'PK\3\4 and no more'})
    for name in ('a.png', 'damaged.zip'):
        message = refused(f'folder:{tmp_path / name}')
        assert f'{tmp_path / name} is neither a folder nor a whole zip file' in message
    zipped(tmp_path / 'empty.zip', {})
    for name in ('p', 'empty.zip'):
        message = refused(f'folder:{tmp_path / name}')
        assert f'no pictures below {tmp_path / name}' in message and '.jpg' in message


@pytest.mark.parametrize('place', range(0, 22, 3))
def test_a_zip_file_with_a_damaged_end_is_named(tmp_path, place):
    content = bytearray(zipped(tmp_path / 'p.zip', {'1.png': PNG[0]}).read_bytes())
    content[len(content) - 22 + place] ^= 0xFF
    (tmp_path / 'p.zip').write_bytes(content)
    try:
        assert names(tmp_path / 'p.zip') == ['1.png']  # a byte that does not matter
    except ValueError as error:
        assert str(tmp_path / 'p.zip') in str(error)


def test_damaged_and_encrypted_members_are_bad_pictures(tmp_path):
    path = zipped(tmp_path / 'p.zip', {f'{i}.png': PNG[i] for i in range(5)})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        places = {info.filename: info.header_offset for info in archive.infolist()}
    content[places['1.png'] + 30 + len('1.png') + 100] ^= 0xFF  # a byte of the picture: the checksum is wrong
    content[places['3.png'] + 6] |= 1  # the flag of encryption, here and in the directory
    at = content.index(b'3.png', places['4.png'] + 60) - 46
    assert content[at : at + 4] == b'PK\1\2'
    content[at + 8] |= 1
    path.write_bytes(content)
    images = load(f'folder:{path}', max_bad_fraction=0.5)
    np.testing.assert_array_equal(images.images, IMAGES[[0, 2, 4]])
    (listed,) = (tmp_path / 'cache').glob('diffusion/*/bad.txt')
    reasons = dict(line.split(' ', 1) for line in listed.read_text().splitlines())
    assert sorted(reasons) == ['1.png', '3.png']
    assert 'CRC' in reasons['1.png'] and 'encrypted' in reasons['3.png']


def test_nothing_is_written_by_a_zip_file(tmp_path):
    """Whatever path it claims for its members."""
    away = {'../up.png': PNG[0], f'{tmp_path}/absolute.png': PNG[1], 'a/../../b.png': PNG[2]}
    inside = tmp_path / 'inside'
    inside.mkdir()
    path = zipped(inside / 'p.zip', away)
    before = sorted(tmp_path.rglob('*'))
    images = load(f'folder:{path}', cache_dir=str(tmp_path / 'cache'))
    assert len(images) == 3
    after = [p for p in sorted(tmp_path.rglob('*')) if tmp_path / 'cache' not in (p, *p.parents)]
    assert after == before


# TFDS.

ATTRIBUTES = {
    f'attribute_{i}': feature('Scalar', tensor={'shape': {}, 'dtype': 'int64', 'encoding': 'none'}) for i in range(3)
}


def test_celeb_a_is_read_as_tfds_prepares_it(tmp_path):
    """Its shape is stated, and attributes lie beside the picture; the bytes of the JPEG are those that were put in."""
    pictures = [encoded(image, 'jpeg') for image in noise(3, 218, 178, 3)]
    examples = {'train': [(p, None) for p in pictures], 'validation': [(pictures[0], None)]}
    write_tfds(tmp_path, 'celeb_a', examples, image=picture_feature('218', '178'), extra=ATTRIBUTES, version='2.1.0')
    source = open_source('tfds:celeb_a', 'train', str(tmp_path))
    assert [source.read(i) for i in range(3)] == [(p, None) for p in pictures]
    assert source.classes is None and 'celeb_a, train, example 2' in source.names
    assert len(open_source('tfds:celeb_a', 'test', str(tmp_path))) == 1  # another name of what is held out


def test_the_newest_version_is_taken(tmp_path):
    for version, image in (('1.9.0', 0), ('1.10.0', 1), ('1.2.0', 2)):
        write_tfds(tmp_path, 'mine', {'train': [(PNG[image], None)]}, version=version)
    (tmp_path / 'mine' / '2.0.0').mkdir()  # a preparation that was stopped
    assert open_source('tfds:mine', 'train', str(tmp_path)).read(0)[0] == PNG[1]
    assert open_source('tfds:mine:1.2.0', 'train', str(tmp_path)).read(0)[0] == PNG[2]
    assert 'mine:1.3.0' in refused('tfds:mine:1.3.0', data_dir=str(tmp_path))


def test_a_config_of_a_dataset_is_a_folder_below_it(tmp_path, monkeypatch):
    write_tfds(tmp_path, 'lsun/church_outdoor', {'train': [(PNG[0], None)]})
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    assert open_source('tfds:lsun/church_outdoor', 'train').read(0)[0] == PNG[0]


def test_a_missing_dataset_is_named_with_the_two_commands(tmp_path):
    for data_dir in ('', str(tmp_path)):
        message = refused('tfds:celeb_a', data_dir=data_dir)
        assert 'make prepare DATASET=celeb_a' in message
        assert '--config.data.source=folder:/path/to/pictures' in message
        assert (f'DATA_DIR={tmp_path}' in message and str(tmp_path / 'celeb_a') in message) == bool(data_dir)


def test_other_formats_splits_and_features_are_named(tmp_path):
    one = {'train': [(PNG[0], None)]}
    write_tfds(tmp_path, 'records', one, fileFormat='tfrecord')
    message = refused('tfds:records', data_dir=str(tmp_path))
    assert 'tfrecord' in message and str(tmp_path / 'records' / '1.0.0') in message and 'make prepare' in message
    write_tfds(tmp_path, 'mine', one)
    message = refused('tfds:mine', 'test', str(tmp_path))
    assert "no split 'test'" in message and 'train' in message
    write_tfds(tmp_path, 'numbers', one, image=ATTRIBUTES['attribute_0'])
    assert 'no images: its features are image' in refused('tfds:numbers', data_dir=str(tmp_path))


@pytest.mark.parametrize('damage', ['features', 'info', 'missing'])
def test_a_damaged_dataset_is_named_with_the_way_out(tmp_path, damage):
    folder = write_tfds(tmp_path, 'mine', {'train': [(png, None) for png in PNG]})
    (records,) = folder.glob('*.array_record-*')
    if damage == 'features':
        (folder / 'features.json').unlink()
    elif damage == 'info':
        (folder / 'dataset_info.json').write_text('{"name": "mi')
    else:
        records.unlink()
    message = refused('tfds:mine', data_dir=str(tmp_path))
    assert str(folder) in message and 'make prepare DATASET=mine' in message


def test_damaged_records_are_bad_pictures(tmp_path):
    """Some of them, or a whole file that is cut off: 800 bytes hold more than two of these pictures."""
    folder = write_tfds(tmp_path, 'mine', {'train': [(png, None) for png in PNG]})
    (records,) = folder.glob('*.array_record-*')
    content = records.read_bytes()
    records.write_bytes(content[:1000] + bytes(800) + content[1800:])
    images = load('tfds:mine', data_dir=str(tmp_path), max_bad_fraction=0.9)
    assert 3 <= len(images) < 11
    kept = [next(i for i in range(12) if (IMAGES[i] == image).all()) for image in images.images]
    (listed,) = (tmp_path / 'cache').glob('diffusion/*/bad.txt')
    bad = [int(line.partition('example ')[2].split()[0]) for line in listed.read_text().splitlines()]
    assert sorted(kept + bad) == list(range(12)) and kept == sorted(kept)
    records.write_bytes(content[:1000])
    with pytest.raises(ValueError, match='12 of 12 pictures cannot be used') as error:
        load('tfds:mine', data_dir=str(tmp_path), max_bad_fraction=0.9)
    assert 'mine, train, example 0 cannot be read' in str(error.value)


def test_reading_tfds_imports_no_tensorflow(tmp_path):
    write_tfds(tmp_path, 'mine', {'train': [(png, None) for png in PNG]})
    code = (
        'import sys; from diffusion import data\n'
        'images = data.load("tfds:mine", data_dir=sys.argv[1], image_size=8, channels=3)\n'
        'print(len(images), {"tensorflow", "torch"} & set(sys.modules))'
    )
    done = subprocess.run([sys.executable, '-c', code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == '12 set()\n', done.stderr


def test_prepared_by_tfds_itself(tmp_path):
    """By the command, where TensorFlow is installed."""
    pytest.importorskip('tensorflow')
    root = fill(tmp_path / 'p', CLASSES)
    command = ['-m', 'diffusion.data.prepare', f'folder:{root}', '--name=pets', f'--data_dir={tmp_path / "tfds"}']
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert f'--config.data.source=tfds:pets --config.data.data_dir={tmp_path / "tfds"}' in done.stdout, done.stderr
    for split in ('train', 'test'):
        ours = load(f'folder:{root}', split)
        prepared = load('tfds:pets', split, data_dir=str(tmp_path / 'tfds'))
        assert prepared.record == ours.record
        np.testing.assert_array_equal(prepared.labels, ours.labels)
