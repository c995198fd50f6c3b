"""The cache of decoded images: what it keeps, when it is built again, and its behaviour under kills, bad pictures and
full disks."""

import dataclasses
import errno
import fcntl
import itertools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diffusion import data
from diffusion.data import cache
from diffusion.data import images as images_module
from diffusion.data.cache import decoded
from diffusion.data.pictures import Preprocessing, decode
from diffusion.data.sources import Source
from diffusion.util import RunError
from tests.galleries import encoded, fill, noise, zipped

ROOT = pathlib.Path(__file__).parents[2]
IMAGES = noise(150, 8, 8, 3)  # more than one chunk
PNG = [encoded(image) for image in IMAGES]
PLAIN = Preprocessing('', 8, 3)


class Counted:
    """A source of pictures in memory that records the reads."""

    def __init__(self, contents, labels=None):
        self.reads = []
        self.source = Source(
            names=[f'{i}.png' for i in range(len(contents))],
            read=lambda i: (self.reads.append(i), decode(contents[i]))[1],
            identity=[len(contents), [len(content) for content in contents]],
            label=labels or (lambda i: i % 7),
            classes=[str(i) for i in range(7)],
        )

    def decoded(self, directory, preprocess=PLAIN, max_bad_fraction=0.0, **options):
        return decoded(self.source, preprocess, directory=str(directory), max_bad_fraction=max_bad_fraction, **options)


def entries(directory):
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


def load(path, directory, **changes):
    return data.load(f'folder:{path}', **{'image_size': 8, 'channels': 3, 'cache_dir': str(directory)} | changes)


def test_pictures_are_decoded_once(tmp_path):
    source = Counted(PNG)
    first = source.decoded(tmp_path)
    assert sorted(source.reads) == list(range(150))
    again = source.decoded(tmp_path)
    assert len(source.reads) == 150
    for images in (first, again):
        np.testing.assert_array_equal(images.images, IMAGES)
        np.testing.assert_array_equal(images.labels, np.arange(150) % 7)
        np.testing.assert_array_equal(images[np.array([149, 3, 3])], IMAGES[[149, 3, 3]])
    assert first.record == again.record
    np.testing.assert_allclose(first.record['channel_means'], IMAGES.mean((0, 1, 2)))


def test_cached_images_are_read_only(tmp_path):
    images = Counted(PNG).decoded(tmp_path)
    with pytest.raises(ValueError, match='read-only'):
        images.images[0] = 0


def test_a_picture_without_a_label_has_label_minus_one(tmp_path):
    images = Counted(PNG, labels=lambda i: None if i == 70 else 3).decoded(tmp_path)
    np.testing.assert_array_equal(images.labels, np.where(np.arange(150) == 70, -1, 3))


def test_uncached_images_are_the_same(tmp_path):
    """But they are not stored, and each is read when it is needed."""
    bad = [b'' if i in (0, 70, 149) else PNG[i] for i in range(150)]
    good = [i for i in range(150) if bad[i]]
    source = Counted(bad)
    kept = source.decoded(tmp_path, max_bad_fraction=0.02)
    images = source.decoded(tmp_path, max_bad_fraction=0.02, keep=False)
    assert len(entries(tmp_path)) == 2
    assert images.record == kept.record and len(images) == 147
    assert images.images.shape == kept.images.shape and images.images.nbytes == kept.images.nbytes
    np.testing.assert_array_equal(images.labels, kept.labels)
    del source.reads[:]
    rows = np.array([[3, 146], [0, 3]])
    np.testing.assert_array_equal(images[rows], kept[rows])
    assert source.reads == [good[3], good[146], good[0], good[3]]
    np.testing.assert_array_equal(images[5:9], kept[5:9])
    np.testing.assert_array_equal(images[7], kept[7])
    sizes = sorted(sum(f.stat().st_size for f in (tmp_path / entry).glob('images.bin')) for entry in entries(tmp_path))
    assert sizes == [0, 147 * 8 * 8 * 3]


@pytest.mark.parametrize('change', ['content', 'time', 'name', 'more', 'crop', 'image_size', 'channels', 'place'])
def test_an_entry_depends_on_the_files_and_the_preprocessing(tmp_path, change):
    """And on nothing else: the same files in another folder have the same entry."""
    root = fill(tmp_path / 'p', {f'{i}.png': PNG[i] for i in range(3)})
    os.utime(root / '1.png', ns=(0, 10**18))
    load(root, tmp_path / 'cache')
    options = {}
    if change == 'content':
        (root / '1.png').write_bytes(PNG[5])
    elif change == 'time':
        os.utime(root / '1.png', ns=(0, 10**18 + 1))
    elif change == 'name':
        (root / '1.png').rename(root / '5.png')
    elif change == 'more':
        (root / '3.png').write_bytes(PNG[3])
    elif change == 'place':
        root = root.rename(tmp_path / 'moved')
    else:
        options = {change: {'crop': 'center', 'image_size': 4, 'channels': 1}[change]}
    images = load(root, tmp_path / 'cache', **options)
    assert len(entries(tmp_path / 'cache')) == (1 if change == 'place' else 2)
    if change == 'content':
        np.testing.assert_array_equal(images.images, IMAGES[[0, 5, 2]])


@pytest.mark.parametrize('keep', [True, False])
def test_other_contents_of_the_same_name_size_and_time_are_noticed(tmp_path, capsys, keep):
    """As an archive leaves them that restores times; an uncompressed format always has the same size."""
    bmp = [encoded(image, 'bmp') for image in IMAGES]
    root = fill(tmp_path / 'p', {f'{i}.bmp': bmp[i] for i in range(5)})
    before = load(root, tmp_path / 'cache', cache=keep)
    np.testing.assert_array_equal(before[:], IMAGES[:5])
    status = (root / '3.bmp').stat()
    (root / '3.bmp').write_bytes(bmp[7])
    os.utime(root / '3.bmp', ns=(status.st_atime_ns, status.st_mtime_ns))
    capsys.readouterr()
    after = load(root, tmp_path / 'cache', cache=keep)
    np.testing.assert_array_equal(after[:], IMAGES[[0, 1, 2, 7, 4]])
    assert after.record['sha256'] != before.record['sha256']
    assert "other contents than when they were decoded, such as '3.bmp'" in capsys.readouterr().out
    load(root, tmp_path / 'cache', cache=keep)
    assert 'other contents' not in capsys.readouterr().out and len(entries(tmp_path / 'cache')) == 1


def test_pictures_that_cannot_be_read_for_a_while_are_not_decoded_again(tmp_path):
    source = dataclasses.replace(Counted(PNG).source, encoded=PNG.__getitem__)
    arguments = dict(directory=str(tmp_path), max_bad_fraction=0.0)
    decoded(source, PLAIN, **arguments)

    def fail(i):
        raise ValueError('cannot be read (Stale file handle)')

    again = decoded(dataclasses.replace(source, encoded=fail, read=fail), PLAIN, **arguments)
    np.testing.assert_array_equal(again.images, IMAGES)


def test_a_changed_zip_file_is_decoded_again(tmp_path):
    path = zipped(tmp_path / 'p.zip', {'1.png': PNG[0]})
    load(path, tmp_path / 'cache')
    os.utime(path)  # the time does not matter, because the checksums of the members are known
    load(path, tmp_path / 'cache')
    assert len(entries(tmp_path / 'cache')) == 1
    zipped(path, {'1.png': PNG[1]})
    np.testing.assert_array_equal(load(path, tmp_path / 'cache').images, IMAGES[[1]])


# Bad pictures.


def test_bad_pictures_are_left_out_and_listed(tmp_path, capsys):
    """The others keep their labels. A warning counts the bad ones, in every run."""
    bad = {0: b'', 64: PNG[64][:50], 148: b'text'}
    contents = [bad.get(i, PNG[i]) for i in range(150)]
    good = [i for i in range(150) if i not in bad]
    source = Counted(contents)
    for _ in range(2):
        images = source.decoded(tmp_path, max_bad_fraction=0.02)
        np.testing.assert_array_equal(images.images, IMAGES[good])
        np.testing.assert_array_equal(images.labels, np.array(good) % 7)
        assert images.record['count'] == 147
        np.testing.assert_allclose(images.record['channel_means'], IMAGES[good].mean((0, 1, 2)))
        output = capsys.readouterr().out
        (entry,) = entries(tmp_path)
        assert output.count('warning') == 1
        assert f'3 of 150 pictures cannot be used; {tmp_path}/{entry}/bad.txt lists them with the reasons' in output
    listed = (tmp_path / entry / 'bad.txt').read_text().splitlines()
    assert [line.split()[0] for line in listed] == ['0.png', '64.png', '148.png']
    for line, reason in zip(listed, ['is empty', 'cannot be decoded', 'is not a picture'], strict=True):
        assert reason in line
    assert len(source.reads) == 150


def test_too_many_bad_pictures_are_an_error(tmp_path):
    """The message lists the first of them, a file lists all, and nothing else remains on the disk."""
    contents = [PNG[i] if i % 10 else b'' for i in range(150)]
    with pytest.raises(ValueError, match='15 of 150 pictures') as error:
        Counted(contents).decoded(tmp_path, max_bad_fraction=0.099)
    message = str(error.value)
    assert 'data.max_bad_fraction=0.099' in message and '--config.data.max_bad_fraction=0.1' in message
    assert [line.split()[0] for line in message.splitlines()[1:]] == ['0.png', '10.png', '20.png', '30.png', '40.png']
    (listed,) = tmp_path.glob('*bad.txt')
    assert str(listed) in message and len(listed.read_text().splitlines()) == 15
    assert entries(tmp_path) == []
    assert len(Counted(contents).decoded(tmp_path, max_bad_fraction=0.1)) == 135


def test_a_smaller_max_bad_fraction_applies_to_an_existing_entry(tmp_path):
    source = Counted([b'', *PNG[1:]])
    source.decoded(tmp_path, max_bad_fraction=0.01)
    with pytest.raises(ValueError, match=r'1 of 150 pictures.*data.max_bad_fraction=0.001') as error:
        source.decoded(tmp_path, max_bad_fraction=0.001)
    assert '0.png is empty' in str(error.value)
    suggested = float(re.search(r'--config.data.max_bad_fraction=([0-9.]+)\.', str(error.value))[1])
    source.decoded(tmp_path, max_bad_fraction=suggested)
    assert len(source.reads) == 150
    source.decoded(tmp_path, max_bad_fraction=0.01)


@pytest.mark.parametrize('count', [2, 3])
def test_an_image_size_above_most_pictures_is_the_fault_of_the_key(tmp_path, count):
    """Nobody is advised to allow that nothing is left."""
    root = fill(tmp_path / 'p', {f'{i}.png': encoded(noise(1, 9, 9)[0]) if i < count else PNG[i] for i in range(3)})
    with pytest.raises(ValueError, match=rf'{3 - count or 3} of 3 pictures') as error:
        load(root, tmp_path / 'cache', image_size=9 if count == 2 else 10)
    assert ('max_bad_fraction=' in str(error.value)) == (count == 2)
    assert 'data.image_size=' in str(error.value) and 'choose a smaller one' in str(error.value)
    with pytest.raises(ValueError, match='3 of 3 pictures'):
        load(root, tmp_path / 'cache', image_size=10, max_bad_fraction=1)


@pytest.mark.parametrize('keep', [True, False])
def test_no_usable_picture_is_an_error(tmp_path, keep):
    root = fill(tmp_path / 'p', {'a.png': b'', 'b.png': b'x'})
    for fraction in (0.5, 1):
        with pytest.raises(ValueError, match=r'2 of 2 pictures|no images'):
            load(root, tmp_path / 'cache', max_bad_fraction=fraction, cache=keep)


def test_an_invalid_max_bad_fraction_is_an_error(tmp_path):
    root = fill(tmp_path / 'p', {'a.png': PNG[0]})
    for fraction in (-0.1, 1.5, float('nan')):
        with pytest.raises(ValueError, match=f'max_bad_fraction is {fraction}'):
            load(root, tmp_path / 'cache', max_bad_fraction=fraction)


def test_a_picture_that_disappears_later_does_not_end_a_run(tmp_path, capsys):
    """The next readable picture replaces it, with one warning. If all disappear, it is an error."""
    root = fill(tmp_path / 'p', {f'{i:02d}.png': PNG[i] for i in range(30)})
    images = load(root, tmp_path / 'cache', cache=False)
    (root / '04.png').unlink()
    (root / '05.png').write_bytes(b'')
    (root / '29.png').unlink()
    for _ in range(2):
        np.testing.assert_array_equal(images[np.array([3, 4, 5, 29])], IMAGES[[3, 6, 6, 0]])
    output = capsys.readouterr().out
    assert output.count('warning') == 3
    assert output.count("'04.png' could be decoded before, but now cannot be read") == 1
    shutil.rmtree(root)
    with pytest.raises(ValueError, match='is the disk still there'):
        images[np.array([7])]


# Full disks and unusable folders.


def test_a_full_disk_is_reported_before_any_picture_is_read(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=28_799))
    source = Counted(PNG)
    with pytest.raises(ValueError, match=r'150 images take 0.0 MB') as error:
        source.decoded(tmp_path)
    for words in (str(tmp_path), '--config.data.cache_dir=', '--config.data.cache=False'):
        assert words in str(error.value)
    assert not source.reads and entries(tmp_path) == []
    assert len(source.decoded(tmp_path, keep=False)) == 150  # this needs no room
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=28_800))
    assert len(source.decoded(tmp_path)) == 150  # 150·8·8·3 bytes suffice


@pytest.mark.parametrize(
    ('module', 'name', 'code'),
    [(os, 'posix_fallocate', errno.ENOSPC), (os, 'makedirs', errno.EROFS), (os, 'replace', errno.EDQUOT)],
)
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, module, name, code):
    with monkeypatch.context() as patched:
        patched.setattr(module, name, refusal(code))
        with pytest.raises(ValueError, match=os.strerror(code)) as error:
            Counted(PNG).decoded(tmp_path / 'cache')
    assert str(tmp_path / 'cache') in str(error.value) and '--config.data.cache_dir=' in str(error.value)
    np.testing.assert_array_equal(Counted(PNG).decoded(tmp_path / 'cache').images, IMAGES)  # once it can be written


@pytest.mark.parametrize('lack', ['call', 'file system'])
def test_systems_without_reservation_of_disk_space(tmp_path, monkeypatch, lack):
    """macOS lacks the call, and some file systems refuse it. The whole file is written then."""
    if lack == 'call':
        monkeypatch.delattr(os, 'posix_fallocate')
    else:
        monkeypatch.setattr(os, 'posix_fallocate', refusal(errno.EOPNOTSUPP))
    with open(tmp_path / 'file', 'wb') as file:
        cache._reserve(file, 3 * 2**20 + 5)
    assert (tmp_path / 'file').stat().st_size == 3 * 2**20 + 5
    assert (tmp_path / 'file').stat().st_blocks * 512 >= 3 * 2**20
    np.testing.assert_array_equal(Counted(PNG).decoded(tmp_path / 'cache').images, IMAGES)


def test_file_systems_without_locks(tmp_path, monkeypatch, capsys):
    """Of two processes that decode the same images, both succeed."""
    monkeypatch.setattr(fcntl, 'flock', refusal(errno.ENOLCK))
    monkeypatch.setattr(fcntl, 'lockf', refusal(errno.ENOLCK))
    first, second = Counted(PNG), Counted(PNG)
    read = first.source.read

    def slow(i):
        if i == 100:
            second.decoded(tmp_path)
        return read(i)

    first.source = dataclasses.replace(first.source, read=slow)
    monkeypatch.setattr(os, 'getpid', itertools.count().__next__)
    np.testing.assert_array_equal(first.decoded(tmp_path).images, IMAGES)
    assert len(entries(tmp_path)) == 1 and len(second.reads) == 150
    assert 'has no locks' in capsys.readouterr().out


def refusal(code):
    """A function that raises an OSError."""

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return refuse


def test_a_cache_below_a_file_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match=r'file/cache cannot be used.*--config.data.cache_dir'):
        Counted(PNG).decoded(tmp_path / 'file' / 'cache')


@pytest.mark.parametrize('file', ['images.bin', 'index.json', 'labels.npy', 'good.npy', 'checksums.npy', 'bad.txt'])
@pytest.mark.parametrize('damage', ['truncated', 'missing'])
def test_a_damaged_entry_is_named(tmp_path, file, damage):
    source = Counted([b'', *PNG[1:]])
    source.decoded(tmp_path, max_bad_fraction=1)
    (entry,) = entries(tmp_path)
    path = tmp_path / entry / file
    path.write_bytes(path.read_bytes()[:20]) if damage == 'truncated' else path.unlink()
    if (file, damage) == ('bad.txt', 'truncated'):  # it is only shown to people
        return
    with pytest.raises(ValueError, match='remove that folder') as error:
        source.decoded(tmp_path, max_bad_fraction=1)
    assert str(tmp_path / entry) in str(error.value)


@pytest.mark.parametrize('file', ['labels.npy', 'good.npy', 'checksums.npy'])
def test_a_file_that_is_not_of_the_same_images_is_named(tmp_path, file):
    """Of one image less, for example, in an intact file."""
    source = Counted(PNG)
    source.decoded(tmp_path)
    (entry,) = entries(tmp_path)
    path = tmp_path / entry / file
    np.save(path, np.load(path)[:-1])
    with pytest.raises(ValueError, match=rf'{file} holds \w+ \(149,\).*remove that folder'):
        source.decoded(tmp_path)


@pytest.mark.filterwarnings('ignore:Reading `.npy`')
def test_no_flipped_bit_of_a_header_changes_an_array(tmp_path):
    """Fewer labels, or other types of them, for example."""
    source = Counted(PNG)
    source.decoded(tmp_path)
    (entry,) = entries(tmp_path)
    path = tmp_path / entry / 'labels.npy'
    intact, expected = path.read_bytes(), np.load(path)
    for bit in range(8 * intact.index(b'\n')):
        damaged = bytearray(intact)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = cache._load(str(path), len(expected), expected.dtype.type)
        except ValueError:
            continue
        np.testing.assert_array_equal(found, expected)
    path.write_bytes(intact.replace(b'(', b'[', 1))
    with pytest.raises(ValueError, match='remove that folder'):
        source.decoded(tmp_path)


@pytest.mark.parametrize('size', [8, 5])  # an image has a multiple of eight bytes, or not
@pytest.mark.parametrize('damage', ['flipped', 'zeros', 'swapped'])
@pytest.mark.parametrize('read', [np.array([3, 70]), slice(None), slice(60, 80), 70, np.arange(150) == 70])
def test_a_damaged_image_is_noticed_when_it_is_read(tmp_path, size, damage, read):
    """And not before. The file keeps its length."""
    images = noise(150, size, size, 3)
    source = Counted([encoded(image) for image in images])
    source.decoded(tmp_path, Preprocessing('', size, 3))
    (entry,) = entries(tmp_path)
    stored = np.memmap(tmp_path / entry / 'images.bin', np.uint8, 'r+', shape=images.shape)
    if damage == 'flipped':
        stored[70, 4, 2, 1] ^= 128
    elif damage == 'zeros':
        stored[70, 1:] = 0
    else:
        stored[[70, 71]] = stored[[71, 70]]
    stored.flush()
    found = source.decoded(tmp_path, Preprocessing('', size, 3))
    np.testing.assert_array_equal(found[np.array([[0, 69], [149, 69]])], images[[[0, 69], [149, 69]]])
    np.testing.assert_array_equal(found[-30:], images[-30:])
    for error in (RunError, ValueError):  # one line in all modes; and training, which catches the latter, saves
        with pytest.raises(error, match=f'{entry} are damaged .*checksum.*: remove that folder'):
            found[read]


def test_each_image_is_compared_once(tmp_path, monkeypatch):
    compared, original = [], images_module.checksums
    Counted(PNG).decoded(tmp_path)
    monkeypatch.setattr(images_module, 'checksums', lambda images: (compared.append(len(images)), original(images))[1])
    images = Counted(PNG).decoded(tmp_path)
    for indices in (np.array([3, 5]), slice(4, 8), slice(None), slice(None), np.array([9])):
        np.testing.assert_array_equal(images[indices], IMAGES[indices])
    assert sum(compared) == 150


@pytest.mark.parametrize('image_bytes', [1, 192, 3 * 256**2, 3 * 1024**2, 3 * 4096**2])
@pytest.mark.parametrize('workers', [2, 128, 512])
def test_decoded_images_that_wait_take_little_memory(image_bytes, workers):
    chunk, ahead = cache._chunk_and_ahead(image_bytes, workers)
    assert chunk * ahead * image_bytes <= cache.WAITING
    assert 1 <= chunk <= cache.CHUNK and 1 <= ahead <= 2 * workers
    assert image_bytes > 10**6 or ahead > workers  # all threads have work


def test_large_images_are_decoded_in_small_chunks(tmp_path, monkeypatch):
    whole = Counted(PNG).decoded(tmp_path / 'whole')
    monkeypatch.setattr(cache, 'WAITING', 500)  # less than three images
    images = Counted([b'', *PNG[1:]]).decoded(tmp_path / 'small', max_bad_fraction=0.01)
    np.testing.assert_array_equal(images[:], IMAGES[1:])
    np.testing.assert_array_equal(images[:], whole[1:])


# Several processes. Each reads slowly, and logs a byte for every read.

SLOW = """
import os, sys, time
from diffusion.data.cache import decoded
from diffusion.data.pictures import Preprocessing
from diffusion.data.sources import Source
from tests.galleries import noise

directory, log, pause = sys.argv[1:]
file, pictures = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), noise(150, 8, 8, 3)

def read(i):
    os.write(file, b'.')
    time.sleep(float(pause))
    return pictures[i]

source = Source(names=[str(i) for i in range(150)], read=read, identity=['slow'])
images = decoded(source, Preprocessing('', 8, 3), directory=directory, max_bad_fraction=0)
print(images.record['sha256'])
"""


def start(directory, log, pause):
    return subprocess.Popen(
        [sys.executable, '-c', SLOW, directory, log, str(pause)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(log, reads, process):
    """Wait until a process has read some pictures."""
    deadline = time.monotonic() + 60
    while not log.exists() or log.stat().st_size < reads:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def finished(*processes):
    """Return what each printed; kill those that run longer than a minute."""
    try:
        return [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope='module')
def sha256(tmp_path_factory):
    return Counted(PNG).decoded(tmp_path_factory.mktemp('cache')).record['sha256']


@pytest.mark.slow
def test_a_killed_build_starts_over(tmp_path, sha256):
    """What it left is ignored and removed. Of two processes that find it, one decodes."""
    directory, logs = tmp_path / 'cache', [tmp_path / str(i) for i in range(3)]
    killed = start(directory, logs[0], 0.02)
    wait_for(logs[0], 20, killed)
    killed.send_signal(signal.SIGKILL)
    finished(killed)
    assert [path.suffix for path in directory.iterdir() if path.is_dir()] == ['.new']

    one = start(directory, logs[1], 0.02)
    other = start(directory, logs[2], 0.02)
    outputs = finished(one, other)
    assert [process.returncode for process in (one, other)] == [0, 0], outputs
    assert [out.splitlines()[-1] for out, _ in outputs] == [sha256, sha256]
    assert sorted(log.stat().st_size if log.exists() else 0 for log in logs[1:]) == [0, 150]
    assert sum('another process is decoding the same images' in out for out, _ in outputs) <= 1  # 0 if it starts late
    assert len(entries(directory)) == 1


@pytest.mark.slow
def test_an_interrupted_build_ends_soon_and_leaves_nothing(tmp_path):
    """It does not wait for the rest of each chunk."""
    process = start(tmp_path / 'cache', tmp_path / 'log', 0.25)
    wait_for(tmp_path / 'log', 5, process)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    ((_, errors),) = finished(process)
    assert time.monotonic() - sent < 5
    assert process.returncode != 0 and errors.splitlines()[-1] == 'KeyboardInterrupt'
    assert entries(tmp_path / 'cache') == []


def test_results_that_wait_in_memory_are_few():
    """Images wait until one thread has hashed those before them."""
    begun = []
    with ThreadPoolExecutor(4) as pool:
        results = cache._map_ahead(pool, begun.append, range(100), 10)
        next(results)
        time.sleep(0.05)
        assert len(begun) == 10
        assert len(list(results)) == 99
