"""Decoded pictures: once, in parallel, into one file on disk, from which training reads them ever after."""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from diffusion.data.sources import digest_of

CHUNK = 64  # pictures a task


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of one split, after preprocessing."""

    images: np.ndarray  # (N, H, W, C) uint8, or anything that is indexed by an array of numbers like it
    labels: np.ndarray | None  # (N,) int32
    record: dict  # what they are and where from: count, preprocessing, fingerprint, …

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        return self.images[indices]


class Undecoded:
    """Images that are decoded whenever they are asked for: for what is too large for the disk.

    All could be decoded once. One that cannot be any more is replaced by the next that can, with a warning: a
    picture that was moved does not end a run. Raises ValueError where RETRIES pictures in a row are gone.
    """

    RETRIES = 20

    def __init__(self, source, preprocess, good):
        self._source, self._preprocess, self._good, self._gone = source, preprocess, good, set()
        self.shape = (len(good), preprocess.image_size, preprocess.image_size, preprocess.channels)
        self.dtype = np.dtype(np.uint8)
        self.nbytes = int(np.prod(self.shape))

    def __len__(self):
        return len(self._good)

    def __getitem__(self, indices):
        rows = np.arange(len(self))[indices]
        images = [self._decode(row) for row in np.ravel(rows)]
        return np.asarray(images, np.uint8).reshape(*np.shape(rows), *self.shape[1:])

    def _decode(self, row):
        for other in range(row, row + self.RETRIES):
            i = int(self._good[other % len(self)])
            try:
                return self._preprocess(self._source.read(i)[0])
            except ValueError as error:
                complaint = f'{self._source.names[i]!r}, which could be decoded before, {error}'
                if i not in self._gone:
                    self._gone.add(i)
                    print(f'warning: {complaint}; the next picture takes its place', flush=True)
        raise ValueError(f'{complaint}; nor can the {self.RETRIES - 1} before it: is the disk still there?')


def decoded(source, preprocess, *, directory, max_bad_fraction, keep=True):
    """The Images of `source`: read from `directory`, where they are put first if they are not there yet.

    Every picture is decoded once. Those that cannot be are left out, listed in bad.txt with the reason, and
    counted in one warning; more than max_bad_fraction of them is an error. The entry is named after all that
    its content depends on, appears whole or not at all, and is built by one process while others wait. With
    keep=False the images themselves are not kept, but only which of them are good.

    Raises ValueError where too many pictures are bad, and where there is no room.
    """
    key = hashlib.sha256(digest_of([source.identity, source.classes, preprocess.record(), keep])).hexdigest()[:16]
    entry = os.path.join(directory, key)
    try:
        if not os.path.exists(entry):
            os.makedirs(directory, exist_ok=True)
            with _alone(entry):
                if not os.path.exists(entry):
                    try:
                        _build(entry, source, preprocess, max_bad_fraction, keep)
                    except BaseException:
                        shutil.rmtree(entry + '.new', ignore_errors=True)
                        raise
        try:
            return _open(entry, source, preprocess, max_bad_fraction, keep)
        except TooManyBadError:
            raise
        except (FileNotFoundError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f'the decoded images in {entry} are damaged ({error}): remove that folder') from error
    except OSError as error:
        raise ValueError(
            f'the cache of decoded images in {directory} cannot be used: {error.strerror or error}; '
            'choose another place by --config.data.cache_dir=…'
        ) from error


class TooManyBadError(ValueError):
    """More pictures cannot be used than data.max_bad_fraction allows."""


@contextlib.contextmanager
def _alone(entry):
    with open(entry + '.lock', 'w', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print('another process decodes the same images; waiting for it …', flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(entry, source, preprocess, max_bad_fraction, keep):
    with open(os.path.join(entry, 'index.json'), encoding='utf-8') as file:
        record = json.load(file)
    bad = len(source) - record['count']
    if bad:
        listed = os.path.join(entry, 'bad.txt')
        _accept(bad, source, listed, max_bad_fraction)
        print(
            f'warning: {_complaint(bad, source, listed)}; remove that folder to have them looked at again', flush=True
        )
    good = np.load(os.path.join(entry, 'good.npy'), allow_pickle=False)
    labels = np.load(os.path.join(entry, 'labels.npy'), allow_pickle=False)
    shape = (record['count'], preprocess.image_size, preprocess.image_size, preprocess.channels)
    if keep and len(good):
        images = np.memmap(os.path.join(entry, 'images.bin'), np.uint8, 'r', shape=shape)
    else:
        images = Undecoded(source, preprocess, good)
    return Images(images, labels if source.classes else None, record)


def _complaint(bad, source, listed):
    return f'{bad} of {len(source)} pictures cannot be used; they are listed with the reasons in {listed}'


def _accept(bad, source, listed, max_bad_fraction):
    """Raise ValueError where too many pictures are bad."""
    if bad > max_bad_fraction * len(source):
        with open(listed, encoding='utf-8') as file:
            first = ''.join(f'\n    {line.rstrip()}' for line, _ in zip(file, range(5), strict=False))
        enough = math.ceil(1000 * bad / len(source)) / 1000
        raise TooManyBadError(
            f'{_complaint(bad, source, listed)}; more than data.max_bad_fraction={max_bad_fraction:g}: '
            f'remove or mend them, or allow so many by --config.data.max_bad_fraction={enough}. '
            f'The first:{first}'
        )


def _in_order(pool, function, items, ahead):
    """As pool.map, but with at most `ahead` results that nobody has taken yet: they would fill the memory."""
    pending = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _size(nbytes):
    return f'{nbytes / 1e9:.1f} GB' if nbytes >= 1e9 else f'{nbytes / 1e6:.1f} MB'


def _build(entry, source, preprocess, max_bad_fraction, keep):
    """Decode everything into a folder beside `entry`, and give it that name at the end."""
    new = entry + '.new'
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    os.makedirs(new)
    size = preprocess.image_size**2 * preprocess.channels
    need, free = len(source) * size * keep, shutil.disk_usage(new).free
    if need > free:
        raise ValueError(
            f'decoded, the {len(source)} images take {_size(need)}, but {os.path.dirname(entry)} has '
            f'{_size(free)} left; choose another place by --config.data.cache_dir=…, or decode them anew '
            'whenever they are needed by --config.data.cache=False'
        )
    path = os.path.join(new, 'images.bin')
    with open(path, 'wb') as file:
        if need:
            os.posix_fallocate(file.fileno(), 0, need)  # a disk that fills up would else kill the process later
    images = np.memmap(path, np.uint8, 'r+', shape=(len(source), size)) if need else None
    labels = np.full(len(source), -1, np.int32)
    reasons, total, digest, stop = {}, np.zeros(preprocess.channels), hashlib.sha256(), threading.Event()

    def decode(start):
        """The good pictures of one chunk, and the sum of each channel."""
        found, sums = [], np.zeros(preprocess.channels)
        for i in range(start, min(start + CHUNK, len(source))):
            if stop.is_set():
                break
            try:
                content, label = source.read(i)
                image = preprocess(content)
            except ValueError as error:
                reasons[i] = str(error)
                continue
            labels[i] = -1 if label is None else label
            found.append(image)
            sums += image.sum(axis=(0, 1), dtype=np.float64)
            if keep:
                images[i] = image.reshape(-1)
        return found, sums

    workers = 2 * (os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(source), desc='decode', unit='image', dynamic_ncols=True) as bar,
    ):
        try:
            for found, sums in _in_order(pool, decode, range(0, len(source), CHUNK), 2 * workers):
                total += sums
                for image in found:
                    digest.update(image)
                bar.update(min(CHUNK, len(source) - bar.n))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise

    listed = entry + '.bad.txt'
    with open(listed, 'w', encoding='utf-8', errors='backslashreplace') as file:
        file.writelines(f'{source.names[i]} {reasons[i]}'.replace('\n', ' ') + '\n' for i in sorted(reasons))
    _accept(len(reasons), source, listed, max_bad_fraction)

    good = np.array([i for i in range(len(source)) if i not in reasons], np.int64)
    if keep and reasons:  # move the good ones together
        for row, i in enumerate(good):
            images[row] = images[i]
    if keep:
        images.flush()
        os.truncate(path, len(good) * size)
    record = {
        'count': len(good),
        'classes': source.classes,
        'preprocessing': preprocess.record(),
        'fingerprint': preprocess.fingerprint(),
        'channel_means': (total / max(1, len(good) * preprocess.image_size**2)).tolist(),  # of 0 … 255
        'sha256': digest.hexdigest(),  # of the pixels, whether they are kept or not
    }
    np.save(os.path.join(new, 'good.npy'), good)
    np.save(os.path.join(new, 'labels.npy'), labels[good])
    os.replace(listed, os.path.join(new, 'bad.txt'))
    with open(os.path.join(new, 'index.json'), 'w', encoding='utf-8') as file:
        json.dump(record, file, indent=2)
    os.replace(new, entry)
