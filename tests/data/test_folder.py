"""Folders and zip files: which files are read, in which split and class, and clear messages about the others."""

import os
import stat
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageFile

from diffusion import data
from diffusion.data import pictures
from diffusion.data.sources import files, open_source
from tests.galleries import encoded, fill, noise, zipped

IMAGES = noise(12, 8, 8, 3)
PNG = [encoded(image) for image in IMAGES]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def load(path, split='train', **changes):
    return data.load(f'folder:{path}', split, **{'image_size': 8, 'channels': 3, **changes})


def names(path, split='train'):
    return list(open_source(f'folder:{path}', split).names)


def error_of(path, split='train'):
    """Return the message of the error that opening a folder raises."""
    with pytest.raises(ValueError) as error:
        open_source(f'folder:{path}', split)
    return str(error.value)


def bad_lines(tmp_path):
    """Return the lines of the list of bad pictures."""
    (listed,) = (tmp_path / 'cache').glob('diffusion/*/bad.txt')
    return listed.read_text().splitlines()


def test_reading_decodes_the_file(tmp_path):
    for path in (fill(tmp_path / 'p', {'a.png': PNG[0]}), zipped(tmp_path / 'p.zip', {'a.png': PNG[0]})):
        source = open_source(f'folder:{path}', 'train')
        np.testing.assert_array_equal(source.read(0), IMAGES[0])
        assert source.encoded(0) == PNG[0] and source.label(0) is None


def test_a_relative_path_starts_at_data_dir(tmp_path):
    fill(tmp_path / 'pictures', {'a.png': PNG[0]})
    assert len(load('pictures', data_dir=str(tmp_path))) == 1


# Which files, in which split and class.


@pytest.mark.parametrize('name', ['test', 'val', 'valid', 'validation'])
@pytest.mark.parametrize('outer', ['', 'unpacked/'])
def test_held_out_pictures_are_found_under_several_names(tmp_path, name, outer):
    root = fill(tmp_path / 'p', {f'{outer}train/a.png': PNG[0], f'{outer}{name}/b.png': PNG[1]})
    assert names(root) == [f'{outer}train/a.png']
    assert names(root, 'test') == [f'{outer}{name}/b.png']
    if name != 'test':
        assert names(root, 'validation') == [f'{outer}{name}/b.png']
    else:
        assert "no split 'validation'" in error_of(root, 'validation')


def test_test_and_validation_are_distinguished(tmp_path):
    root = fill(tmp_path / 'p', {f'{split}/a.png': PNG[0] for split in ('train', 'valid', 'test')})
    for split, name in (('train', 'train/a.png'), ('validation', 'valid/a.png'), ('test', 'test/a.png')):
        assert names(root, split) == [name]


def test_without_split_folders_all_pictures_are_for_training(tmp_path):
    root = fill(tmp_path / 'p', {'img_align_celeba/000001.jpg': encoded(IMAGES[0], 'jpeg')})
    source = open_source(f'folder:{root}', 'train')
    assert list(source.names) == ['img_align_celeba/000001.jpg'] and source.classes is None
    message = error_of(root, 'test')
    assert f'no folder test/ in {root}' in message and "'train'" in message


def test_classes_are_the_same_in_each_split(tmp_path):
    """Even if only one split has a class: a number always means the same class."""
    files = {f'train/{c}/{c}.png': PNG[0] for c in 'bd'} | {f'test/{c}/{c}.png': PNG[0] for c in 'abd'}
    root = fill(tmp_path / 'p', files)
    for split, labels in (('train', [1, 2]), ('test', [0, 1, 2])):
        images = load(root, split)
        assert images.record['classes'] == ['a', 'b', 'd']
        np.testing.assert_array_equal(images.labels, labels)


def test_a_new_class_in_another_split_renumbers_cached_labels(tmp_path):
    root = fill(tmp_path / 'p', {'train/b/1.png': PNG[0], 'train/c/1.png': PNG[1]})
    np.testing.assert_array_equal(load(root).labels, [0, 1])
    fill(root, {'test/a/1.png': PNG[2]})
    images = load(root)
    np.testing.assert_array_equal(images.labels, [1, 2])
    assert images.record['classes'] == ['a', 'b', 'c']


def test_a_picture_outside_the_class_folders_removes_all_labels(tmp_path, capsys):
    """It has no class; no labels are better than a wrong one."""
    root = fill(tmp_path / 'p', {'a/1.png': PNG[0], 'b/1.png': PNG[1], 'stray.png': PNG[2]})
    images = load(root)
    assert len(images) == 3 and images.labels is None and images.record['classes'] is None
    assert f'no labels: 1 of 3 pictures in {root}' in capsys.readouterr().out


def test_held_out_pictures_without_classes_leave_those_of_training(tmp_path, capsys):
    """As in a competition, whose test set is one folder."""
    files = {'train/a/1.png': PNG[0], 'train/b/1.png': PNG[1], 'test/1.png': PNG[2]}
    root = fill(tmp_path / 'p', files)
    np.testing.assert_array_equal(load(root).labels, [0, 1])
    assert load(root, 'test').labels is None
    assert f'no labels: 1 of 1 pictures in {root} for test' not in capsys.readouterr().out  # it has no class folders


def test_a_split_that_takes_the_place_of_another_is_said(tmp_path, capsys):
    root = fill(tmp_path / 'p', {'train/1.png': PNG[0], 'val/2.png': PNG[1]})
    assert names(root, 'test') == ['val/2.png']
    load(root, 'test')
    assert "there is no split 'test': 'validation' is used in its place" in capsys.readouterr().out
    load(root, 'train')
    assert 'in its place' not in capsys.readouterr().out


def test_classes_without_a_picture_in_the_split_are_named(tmp_path, capsys):
    files = {f'train/{c}/1.png': PNG[0] for c in ('cat', 'dog')} | {f'test/{c}/1.png': PNG[1] for c in ('Cat', 'dog')}
    assert load(fill(tmp_path / 'p', files)).record['classes'] == ['Cat', 'cat', 'dog']
    assert "warning: 1 of 3 classes have no pictures in train: 'Cat'" in capsys.readouterr().out


def test_order_is_by_name_and_names_may_be_in_any_script(tmp_path):
    plain = ['ångström.png', 'Ωμέγα.png', '写真/猫 1.png', '🎨.png', 'a b\nc.png', 'quote\'".png', 'UPPER.PNG']
    files = {name: PNG[i] for i, name in enumerate(plain)}
    root = fill(tmp_path / 'p', files)
    assert names(root) == sorted(plain)
    np.testing.assert_array_equal(load(root).images, IMAGES[[plain.index(name) for name in sorted(plain)]])
    assert names(zipped(tmp_path / 'p.zip', files)) == sorted(plain)


def test_names_that_are_not_valid_unicode_are_read(tmp_path):
    """They may be names of bad pictures, which are listed, and of classes."""
    folder = os.fsencode(tmp_path / 'p') + b'/\xff'
    os.makedirs(folder)
    for name, content in ((b'caf\xe9.png', PNG[0]), (b'\x80bad.png', b'')):
        with open(os.path.join(folder, name), 'wb') as file:
            file.write(content)
    fill(tmp_path / 'p', {'a/1.png': PNG[1]})
    for _ in range(2):  # decoded, and from the cache
        images = load(tmp_path / 'p', max_bad_fraction=0.5)
        np.testing.assert_array_equal(images.images, IMAGES[[1, 0]])
        np.testing.assert_array_equal(images.labels, [0, 1])
        assert images.record['classes'] == ['a', '\udcff']
    assert bad_lines(tmp_path) == ['\\udcff/\\udc80bad.png is empty']


def test_links_are_followed_except_to_a_folder_above_them(tmp_path):
    root = fill(tmp_path / 'p', {'a/1.png': PNG[0]})
    fill(tmp_path / 'elsewhere', {'2.png': PNG[1], 'deeper/3.png': PNG[2]})
    (root / 'b').symlink_to(tmp_path / 'elsewhere')
    (root / 'a' / 'up').symlink_to(root)  # a loop
    (root / 'a' / 'self').symlink_to(root / 'a' / 'self')
    (tmp_path / 'elsewhere' / 'deeper' / 'up').symlink_to(tmp_path / 'elsewhere')  # another, not to the root
    (root / 'c').symlink_to(root / 'a')  # the same folder again: it may be another class, or another split
    (root / 'linked.png').symlink_to(root / 'a' / '1.png')
    assert names(root) == ['a/1.png', 'b/2.png', 'b/deeper/3.png', 'c/1.png', 'linked.png']


def test_broken_links_are_bad_pictures_and_other_things_are_ignored(tmp_path):
    root = fill(tmp_path / 'p', {f'{i}.png': PNG[i] for i in range(3)})
    (root / 'nothing.png').symlink_to(root / 'missing')
    (root / 'self.png').symlink_to(root / 'self.png')
    (root / 'folder.png').mkdir()
    os.mkfifo(root / 'pipe.png')  # reading it would block forever
    images = load(root, max_bad_fraction=0.5)
    assert len(images) == 3
    lines = bad_lines(tmp_path)
    assert [line.split()[0] for line in lines] == ['nothing.png', 'self.png']
    assert all('cannot be read' in line for line in lines)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_unreadable_files_and_folders_are_left_out(tmp_path, capsys):
    root = fill(tmp_path / 'p', {'a.png': PNG[0], 'b.png': PNG[1], 'closed/c.png': PNG[2]})
    (root / 'b.png').chmod(0)
    (root / 'closed').chmod(0)
    try:
        assert len(load(root, max_bad_fraction=0.5)) == 1
    finally:
        (root / 'closed').chmod(0o700)
    assert 'closed' in capsys.readouterr().out


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch, capsys):
    root = fill(tmp_path / 'p', {'a.png': PNG[0], 'closed/c.png': PNG[2]})
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == 'closed':
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    assert names(root) == ['a.png']
    assert f"'{root}/closed' cannot be read (Permission denied)" in capsys.readouterr().out


def test_hidden_and_other_files_are_ignored(tmp_path):
    """Such as those that file managers and archivers leave behind."""
    files = dict.fromkeys(
        ['.hidden.png', '.thumbnails/1.png', '__MACOSX/._1.png', 'a/._1.png', 'Thumbs.db', 'list.txt', 'README'], b'x'
    )
    files |= {'a/1.png': PNG[0], 'b..png': PNG[1], '__MACOSX_and_more.png': PNG[2]}
    root = fill(tmp_path / 'p', files)
    (root / 'z').symlink_to(fill(root / '.kept', {'2.png': PNG[3]}))  # a visible link to a hidden folder
    visible = ['__MACOSX_and_more.png', 'a/1.png', 'b..png']
    assert names(root) == [*visible, 'z/2.png']
    assert names(zipped(tmp_path / 'p.zip', files)) == visible


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_pictures_are_chosen_by_suffix_and_the_others_are_counted(tmp_path, kind):
    files = {}
    for suffix in pictures.suffixes():
        files |= {f'1{suffix}': PNG[0], f'2{suffix.upper()}': PNG[1], f'3{suffix}.part': PNG[2]}
    files |= {'a.heic': PNG[3], 'b.HEIC': PNG[4], 'list.txt': b'', 'c/list.txt': b''}
    root = fill(tmp_path / 'p', files) if kind == 'folder' else zipped(tmp_path / 'p.zip', files)
    source = open_source(f'folder:{root}', 'train')
    assert list(source.names) == sorted(name for name in files if name.lower().endswith(pictures.suffixes()))
    count = len(pictures.suffixes())
    assert f'left out, as files of kinds that are not read: {count} .part, 2 .heic, 2 .txt' in source.about


def test_a_user_can_add_a_format(tmp_path, monkeypatch):
    """As pillow-heif adds HEIF to Pillow."""

    class Reader(ImageFile.ImageFile):
        format = 'MINE'

        def _open(self):
            self._mode, self._size = 'L', (4, 4)
            self.tile = [ImageFile._Tile('raw', (0, 0, 4, 4), 0, 'L')]

    root = fill(tmp_path / 'p', {'a.MINE': b'mine' + bytes(range(12)), 'b': b'mine' + bytes(12)})
    assert 'no pictures below' in error_of(root)
    monkeypatch.setitem(Image.OPEN, 'MINE', (Reader, lambda prefix: prefix.startswith(b'mine')))
    monkeypatch.setitem(pictures.FORMATS, 'MINE', ('.mine',))
    source = open_source(f'folder:{root}', 'train')
    assert list(source.names) == ['a.MINE', 'b']
    np.testing.assert_array_equal(source.read(0).ravel()[4:], range(12))


@pytest.mark.parametrize('suffix', ['.jfif', '.avif', '.jpe', '.apng', '.j2k', '.pnm', '.ico', '.sgi'])
def test_pictures_that_pillow_opens_are_read(tmp_path, suffix):
    """Whatever the case of their suffix."""
    Image.init()
    content = encoded(noise(1, 16, 16)[0], Image.registered_extensions()[suffix])
    root = fill(tmp_path / 'p', {f'a{suffix.upper()}': content})
    assert open_source(f'folder:{root}', 'train').read(0).shape[:2] == (16, 16)


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_files_without_a_suffix_are_chosen_by_content(tmp_path, kind):
    """A number after a dot is no suffix, and neither is a part of a sentence."""
    pictures = {'a/0001': PNG[0], 'a/frame.0002': encoded(IMAGES[1], 'jpeg'), 'a/Dr. No': encoded(IMAGES[2], 'webp')}
    others = {'README': b'Pictures of cats', 'LICENSE': b'P5 and more', 'empty': b'', 'Makefile': b'all:\n'}
    files = pictures | others
    root = fill(tmp_path / 'p', files) if kind == 'folder' else zipped(tmp_path / 'p.zip', files)
    source = open_source(f'folder:{root}', 'train')
    assert list(source.names) == sorted(pictures) and source.read(0).shape == (8, 8, 3)
    assert 'left out, as files of kinds that are not read: 4 without a suffix' in source.about


def test_both_files_of_the_same_name_in_a_zip_file_are_read(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / 'p.zip', 'w') as archive, pytest.warns(UserWarning, match='Duplicate name'):
        for name, content in (('a.png', PNG[0]), ('b.png', PNG[1]), ('a.png', PNG[2])):
            archive.writestr(name, content)
    images = load(tmp_path / 'p.zip').images
    assert {image.tobytes() for image in images} == {image.tobytes() for image in IMAGES[:3]}
    assert 'have the same name' in capsys.readouterr().out


def test_links_and_pipes_are_counted(tmp_path):
    root = fill(tmp_path / 'p', {'1.png': PNG[0]})
    (root / 'cats').symlink_to(root / 'missing')
    os.mkfifo(root / 'pipe.png')
    (line,) = open_source(f'folder:{root}', 'train').about[1:]
    assert line.endswith(': 1 broken link, 1 pipe or device')
    with zipfile.ZipFile(tmp_path / 'p.zip', 'w') as archive:
        archive.writestr('1.png', PNG[0])
        link = zipfile.ZipInfo('2.png')
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, '1.png')
    assert open_source(f'folder:{tmp_path / "p.zip"}', 'train').about[1].endswith(': 1 link')


# Missing and damaged files.


def test_a_missing_folder_is_named_with_the_way_out(tmp_path):
    message = error_of(tmp_path / 'none')
    assert str(tmp_path / 'none') in message and '--config.data.source=folder:/path/to/pictures' in message


def test_a_file_or_an_empty_folder_is_named(tmp_path):
    fill(tmp_path, {'a.png': PNG[0], 'p/list.txt': b'', 'damaged.zip': b'PK\3\4 and no more'})
    for name in ('a.png', 'damaged.zip'):
        assert f'{tmp_path / name} is neither a folder nor a complete zip file' in error_of(tmp_path / name)
    zipped(tmp_path / 'empty.zip', {})
    for name in ('p', 'empty.zip'):
        message = error_of(tmp_path / name)
        assert f'no pictures below {tmp_path / name}' in message and '.jpg' in message


@pytest.mark.parametrize('place', range(0, 22, 3))
def test_a_zip_file_with_a_damaged_end_is_named(tmp_path, place):
    content = bytearray(zipped(tmp_path / 'p.zip', {'1.png': PNG[0]}).read_bytes())
    content[len(content) - 22 + place] ^= 0xFF
    (tmp_path / 'p.zip').write_bytes(content)
    try:
        assert names(tmp_path / 'p.zip') == ['1.png']  # this byte does not matter
    except ValueError as error:
        assert str(tmp_path / 'p.zip') in str(error)


def test_damaged_and_encrypted_members_are_bad_pictures(tmp_path):
    path = zipped(tmp_path / 'p.zip', {f'{i}.png': PNG[i] for i in range(5)})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        places = {info.filename: info.header_offset for info in archive.infolist()}
    content[places['1.png'] + 30 + len('1.png') + 100] ^= 0xFF  # a byte of the picture, so that its checksum is wrong
    content[places['3.png'] + 6] |= 1  # the flag of encryption, here and in the directory
    at = content.index(b'3.png', places['4.png'] + 60) - 46
    assert content[at : at + 4] == b'PK\1\2'
    content[at + 8] |= 1
    path.write_bytes(content)
    images = load(path, max_bad_fraction=0.5)
    np.testing.assert_array_equal(images.images, IMAGES[[0, 2, 4]])
    reasons = dict(line.split(' ', 1) for line in bad_lines(tmp_path))
    assert sorted(reasons) == ['1.png', '3.png']
    assert 'CRC' in reasons['1.png'] and 'encrypted' in reasons['3.png']


def test_a_member_that_is_too_large_for_a_picture_is_not_read(tmp_path):
    """Zeros take a thousandth of their size in the file."""
    path = tmp_path / 'p.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('1.png', PNG[0])
        with archive.open('2.png', 'w', force_zip64=True) as member:
            for _ in range(2):
                member.write(bytes(2**20))
    source = open_source(f'folder:{path}', 'train', max_pixels=100_000)
    np.testing.assert_array_equal(source.read(0), IMAGES[0])
    tracemalloc.start()
    with pytest.raises(ValueError, match=r'has 2,097,152 bytes, more than .* data.max_pixels=100000'):
        source.read(1)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_no_more_of_a_large_member_is_read_than_its_header_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'LARGE', 1000)
    large = noise(1, 40, 40, 3)[0]
    contents = {
        'large.png': encoded(large),
        'large.tiff': encoded(large, 'tiff'),  # its header lies at the end
        'padded.png': PNG[0] + bytes(10_000),
        'zeros.png': bytes(10_000),
    }
    source = open_source(f'folder:{zipped(tmp_path / "p.zip", contents)}', 'train')
    for i in range(2):
        np.testing.assert_array_equal(source.read(i), large)
    for i, words in ((2, 'of a picture of 64 pixels'), (3, 'of a picture of 0 pixels')):
        with pytest.raises(ValueError, match=rf'has 10,\d+ bytes, but its header is that {words}'):
            source.read(i)
    source = open_source(f'folder:{fill(tmp_path / "p", contents)}', 'train')
    for i, expected in enumerate((large, large, IMAGES[0])):
        np.testing.assert_array_equal(source.read(i), expected)


def test_a_pipe_in_place_of_a_zip_file_is_named(tmp_path):
    """Opening it would wait for ever."""
    os.mkfifo(tmp_path / 'p.zip')
    assert 'neither a folder nor a complete zip file' in error_of(tmp_path / 'p.zip')


def test_nothing_is_written_by_a_zip_file(tmp_path):
    """Whatever paths its members have."""
    files = {'../up.png': PNG[0], f'{tmp_path}/absolute.png': PNG[1], 'a/../../b.png': PNG[2]}
    inside = tmp_path / 'inside'
    inside.mkdir()
    path = zipped(inside / 'p.zip', files)
    before = sorted(tmp_path.rglob('*'))
    assert len(load(path)) == 3
    after = [p for p in sorted(tmp_path.rglob('*')) if tmp_path / 'cache' not in (p, *p.parents)]
    assert after == before
