"""The cache of decoded images: every picture is decoded once, in parallel, into one file that training reads."""

import collections
import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float64, Int32, UInt8, UInt64

from diffusion.data.images import Checksums, Images, Undecoded, checksums
from diffusion.data.pictures import Preprocessing
from diffusion.data.sources import Source
from diffusion.util import exclusive, npy_header, progress, read_json, say, unfinished, write_json

CHUNK = 64  # pictures in one task of the thread pool, or fewer if they are large
WAITING = 2**30  # bytes, at most, of images that were decoded and wait for those before them
CHECKED = 100  # pictures whose contents are compared whenever an entry is used
FORMAT = 3  # version of the entries' file format
MISSING = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # errors of calls that a file system lacks

Item = TypeVar('Item')
Result = TypeVar('Result')


def decoded(
    source: Source, preprocess: Preprocessing, *, directory: str, max_bad_fraction: float, keep: bool = True
) -> Images:
    """Return the images of a source from its entry in the cache; if there is none, decode the pictures and add it.

    Pictures that cannot be used are left out, listed in the entry's bad.txt with the reasons, and counted in one
    warning. The entry is named after the preprocessing and the pictures' identity (of files: their names, sizes and
    times of modification). Whenever it is used, the contents of up to CHECKED files are compared with those that were
    decoded; if they have changed, all are decoded again. Each image is compared with its checksum when it is first
    read. The entry appears complete or not at all. One process builds it while others wait.

    Args:
        source: the pictures.
        preprocess: applied to each picture.
        directory: the folder of the cache.
        max_bad_fraction: more unusable pictures than this fraction are an error.
        keep: keep the images. If False, the entry records only which pictures can be used, and the images are
            decoded whenever they are needed.

    Returns:
        The images, uint8, with their labels.

    Raises:
        ValueError: too many pictures are unusable, the disk is full, or the entry cannot be written or read.
    """
    described = json.dumps([FORMAT, source.identity, source.classes, preprocess.record(), keep], sort_keys=True)
    entry = os.path.join(directory, hashlib.sha256(described.encode()).hexdigest()[:16])
    try:
        changed = _changed(entry, source)
        if changed:
            say(
                f'warning: pictures have other contents than when they were decoded, such as {changed[0]!r}, but the '
                'same name, size and time: all are decoded again'
            )
        if changed or not os.path.exists(entry):
            os.makedirs(directory, exist_ok=True)
            with _alone(entry) as new:
                if _changed(entry, source):
                    shutil.rmtree(entry)
                if not os.path.exists(entry):
                    _build(entry, new, source, preprocess, max_bad_fraction, keep)
        return _open(entry, source, preprocess, max_bad_fraction, keep)
    except OSError as error:
        raise ValueError(
            f'the cache of decoded images in {directory} cannot be used: {error.strerror or error}; '
            'choose another folder by --config.data.cache_dir=…'
        ) from error


def _open(entry: str, source: Source, preprocess: Preprocessing, max_bad_fraction: float, keep: bool) -> Images:
    """Return the images of a complete entry."""
    listed = os.path.join(entry, 'bad.txt')
    try:
        record = read_json(os.path.join(entry, 'index.json'))
        count = record['count']
        good = _load(os.path.join(entry, 'good.npy'), count, np.int64)
        labels = _load(os.path.join(entry, 'labels.npy'), count, np.int32)
        images: Any = Undecoded(source, preprocess, good, labels)
        sums = None
        if keep and len(good):
            images = np.memmap(os.path.join(entry, 'images.bin'), np.uint8, 'r', shape=(count, *preprocess.shape))
            expected = _load(os.path.join(entry, 'checksums.npy'), count, np.uint64)
            sums = Checksums(expected, str(_damaged(entry, 'an image differs from its checksum')))
        os.stat(listed)
    except (FileNotFoundError, ValueError, KeyError, EOFError) as error:
        raise _damaged(entry, error) from error
    bad = len(source) - count
    _check_bad(bad, source, listed, max_bad_fraction)
    if bad:
        say(f'warning: {_summary(bad, source, listed)}; remove that folder to check them again')
    return Images(images, labels if source.classes else None, record, checksums=sums)


def _load(path: str, count: int, dtype: type) -> np.ndarray:
    """Return the array of `count` numbers in a file. Raises ValueError if it holds something else."""
    with npy_header(os.path.basename(path)), open(path, 'rb') as file:
        array = np.load(file, allow_pickle=False)
        rest = file.read()
    if array.shape != (count,) or array.dtype != dtype or rest:
        found = f'{array.dtype} {array.shape}{" and more" if rest else ""}'
        raise ValueError(f'{os.path.basename(path)} holds {found}, but {np.dtype(dtype)} ({count},) was expected')
    return array


@contextlib.contextmanager
def _alone(entry: str) -> Iterator[str]:
    """Keep other processes from building an entry, and return the folder to build it in."""
    with contextlib.ExitStack() as stack:
        new = entry + '.new'
        try:
            waiting = 'another process is decoding the same images; waiting for it …'
            stack.enter_context(exclusive(entry + '.lock', waiting))
        except OSError as error:
            if error.errno != errno.ENOLCK:
                raise
            say(f'the file system of {entry} has no locks: processes that need the same images all decode them')
            new = f'{entry}.{socket.gethostname()}.{os.getpid()}.new'
        yield new


def _changed(entry: str, source: Source) -> list[str]:
    """Return the names of pictures whose contents are not those that an entry was built from."""
    path = os.path.join(entry, 'contents.json')
    if not os.path.exists(path):
        return []
    try:
        known = dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise _damaged(entry, error) from error
    return [name for name, content in _contents(source).items() if known.get(name, content) != content]


def _contents(source: Source) -> dict[str, str]:
    """Return {name: SHA-256} of some files, evenly spaced, without those that cannot be read."""
    found: dict[str, str] = {}
    if source.encoded is not None and len(source):
        for i in np.unique(np.linspace(0, len(source) - 1, min(CHECKED, len(source))).round().astype(int)).tolist():
            with contextlib.suppress(ValueError):
                found[source.names[i]] = hashlib.sha256(source.encoded(i)).hexdigest()
    return found


def _build(
    entry: str, new: str, source: Source, preprocess: Preprocessing, max_bad_fraction: float, keep: bool
) -> None:
    """Decode everything into the folder `new` beside `entry`; rename it when it is complete."""
    shutil.rmtree(new, ignore_errors=True)  # left by a process that was killed
    with unfinished(new):
        os.makedirs(new)
        path = os.path.join(new, 'images.bin')
        images = _allocate(path, len(source), preprocess.shape) if keep and len(source) else None
        contents = _contents(source)  # before decoding: what changes meanwhile is noticed later
        outcome = _decode(source, preprocess, images)

        listed = new.removesuffix('.new') + '.bad.txt'  # outside the folder, so that it outlives an error
        with open(listed, 'w', encoding='utf-8', errors='backslashreplace') as file:
            for i, reason in sorted(outcome.reasons.items()):
                file.write(f'{source.names[i]} {reason}'.replace('\n', ' ') + '\n')
        _check_bad(len(outcome.reasons), source, listed, max_bad_fraction)

        good = np.array([i for i in range(len(source)) if i not in outcome.reasons], np.int64)
        if images is not None:
            _compact(path, images, good)
            np.save(os.path.join(new, 'checksums.npy'), outcome.checksums)
        np.save(os.path.join(new, 'good.npy'), good)
        np.save(os.path.join(new, 'labels.npy'), outcome.labels[good])
        os.replace(listed, os.path.join(new, 'bad.txt'))
        record = {
            'count': len(good),
            'classes': source.classes,
            'preprocessing': preprocess.record(),
            'fingerprint': preprocess.fingerprint(),
            'channel_means': (outcome.sums / max(1, len(good) * preprocess.image_size**2)).tolist(),  # in 0 … 255
            'sha256': outcome.sha256,  # of the pixels of all images
        }
        write_json(os.path.join(new, 'index.json'), record)
        write_json(os.path.join(new, 'contents.json'), contents)
        try:
            os.replace(new, entry)
        except OSError:
            if not os.path.exists(entry):
                raise
            shutil.rmtree(new)  # without locks, another process was faster


def _allocate(path: str, count: int, shape: tuple[int, int, int]) -> UInt8[np.memmap, 'N H W C']:
    """Create a file for `count` images and map it into memory."""
    need, free = count * math.prod(shape), shutil.disk_usage(os.path.dirname(path)).free
    if need > free:
        raise ValueError(
            f'decoded, the {count} images take {_size(need)}, but {os.path.dirname(os.path.dirname(path))} has only '
            f'{_size(free)} left; choose another folder by --config.data.cache_dir=…, or decode the pictures whenever '
            'they are needed by --config.data.cache=False'
        )
    with open(path, 'wb') as file:
        _reserve(file, need)
    return np.memmap(path, np.uint8, 'r+', shape=(count, *shape))


def _reserve(file: BinaryIO, nbytes: int) -> None:
    """Allocate the disk space of an empty file: writing to a mapped file on a full disk kills the process."""
    allocate = getattr(os, 'posix_fallocate', None)  # macOS has none
    if allocate:
        try:
            allocate(file.fileno(), 0, nbytes)
            return
        except OSError as error:
            if error.errno not in MISSING:
                raise
    zeros = bytes(2**20)
    for start in range(0, nbytes, len(zeros)):
        file.write(zeros[: nbytes - start])


def _compact(path: str, images: UInt8[np.memmap, 'N H W C'], good: np.ndarray) -> None:
    """Move the good images to the start of the file, and cut off the rest."""
    if len(good) < len(images):
        for row, i in enumerate(good):
            images[row] = images[i]
    images.flush()
    os.truncate(path, len(good) * math.prod(images.shape[1:]))


class _Outcome(NamedTuple):
    labels: Int32[np.ndarray, 'N']  # −1 where there is none
    reasons: dict[int, str]  # why a picture cannot be used, by its index
    sums: Float64[np.ndarray, 'C']  # of each channel, over all images
    checksums: UInt64[np.ndarray, 'good']  # of each image
    sha256: str  # of the pixels of all images


def _decode(source: Source, preprocess: Preprocessing, images: UInt8[np.memmap, 'N H W C'] | None) -> _Outcome:
    """Decode every picture in a thread pool, and store the images in `images`, if given."""
    labels = np.full(len(source), -1, np.int32)
    reasons: dict[int, str] = {}
    workers = 2 * (os.cpu_count() or 1)
    chunk, ahead = _chunk_and_ahead(math.prod(preprocess.shape), workers)
    sums, digest, stop = np.zeros(preprocess.channels), hashlib.sha256(), threading.Event()
    all_checksums: list[np.ndarray] = []

    def decode_chunk(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the good images of one chunk, the sum of each channel over them, and their checksums."""
        found: list[np.ndarray] = []
        for i in range(start, min(start + chunk, len(source))):
            if stop.is_set():
                break
            try:
                image, label = preprocess(source.read(i)), source.label(i)
            except ValueError as error:
                reasons[i] = str(error)
                continue
            found.append(image)
            if label is not None:
                labels[i] = label
            if images is not None:
                images[i] = image
        good = np.asarray(found, np.uint8).reshape(-1, *preprocess.shape)
        return good, good.sum(axis=(0, 1, 2), dtype=np.float64), checksums(good)

    with (
        ThreadPoolExecutor(workers) as pool,
        progress(total=len(source), doing='decode', unit='image') as bar,
    ):
        try:
            for good, good_sums, good_checksums in _map_ahead(pool, decode_chunk, range(0, len(source), chunk), ahead):
                sums += good_sums
                all_checksums.append(good_checksums)
                digest.update(good.data)
                bar.update(min(chunk, len(source) - bar.n))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return _Outcome(labels, reasons, sums, np.concatenate([np.zeros(0, np.uint64), *all_checksums]), digest.hexdigest())


def _chunk_and_ahead(image_bytes: int, workers: int) -> tuple[int, int]:
    """Return how many images are in a chunk, and how many chunks are in memory at a time."""
    ahead = max(1, min(2 * workers, WAITING // image_bytes))
    return max(1, min(CHUNK, WAITING // (ahead * image_bytes))), ahead


def _map_ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Like `pool.map`, but with at most `ahead` results in memory."""
    pending: collections.deque[Future[Result]] = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _summary(bad: int, source: Source, listed: str) -> str:
    return f'{bad} of {len(source)} pictures cannot be used; {listed} lists them with the reasons'


def _check_bad(bad: int, source: Source, listed: str, max_bad_fraction: float) -> None:
    """Raise ValueError if too many pictures cannot be used."""
    if bad > max_bad_fraction * len(source) or 0 < bad == len(source):
        with open(listed, encoding='utf-8') as file:
            first = ''.join(f'\n    {line.rstrip()}' for line in itertools.islice(file, 5))
        allow = f'. {too_many(bad, len(source), max_bad_fraction)}'
        # If most cannot be used, it is rarely the pictures that are wrong.
        raise ValueError(f'{_summary(bad, source, listed)}{allow if 2 * bad <= len(source) else ""}. The first:{first}')


def too_many(bad: int, count: int, max_bad_fraction: float) -> str:
    """Return what the user can do if more than a fraction of `count` pictures cannot be used."""
    enough = math.ceil(1000 * bad / count) / 1000
    return (
        f'This is more than data.max_bad_fraction={max_bad_fraction:g}: remove or repair them, or allow as many '
        f'by --config.data.max_bad_fraction={enough}'
    )


def _damaged(entry: str, error: Exception | str) -> ValueError:
    return ValueError(f'the decoded images in {entry} are damaged ({error}): remove that folder')


def _size(nbytes: int) -> str:
    return f'{nbytes / 1e9:.1f} GB' if nbytes >= 1e9 else f'{nbytes / 1e6:.1f} MB'
