"""The images of one split, in memory, in a file, or decoded whenever they are needed."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt64

from diffusion.data.pictures import Preprocessing
from diffusion.data.sources import Source
from diffusion.util import RunError, say

PART = 2**24  # bytes of images whose checksums are computed at a time


class UnreadableError(RunError, ValueError):
    """Images that could be used when the data set was opened cannot be read any more."""


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of one split, after preprocessing.

    Attributes:
        images: (N, H, W, C) uint8, or an object with shape, dtype and nbytes that is indexed in the same way.
        labels: (N,) int32 indices into record['classes'], or None if the source has no labels.
        record: a description as JSON: count, classes, preprocessing, fingerprint, channel_means, sha256; and
            labels_sha256 if it comes from `labelled`.
        shards: the parts that they were joined from; () if they are one array.
        checksums: with which each image is compared when it is read for the first time; None compares nothing.
    """

    images: Any
    labels: Int32[np.ndarray, 'N'] | None
    record: dict[str, Any]
    shards: Sequence['Images'] = ()
    checksums: 'Checksums | None' = None

    @property
    def num_shards(self) -> int:
        """The number of shards that the record describes, which are those of all hosts; 1 for one array."""
        return len(self.record['counts']) if self.shards else 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Any) -> UInt8[np.ndarray, '*batch H W C']:
        found = self.images[indices]
        if self.checksums is not None:
            self.checksums.require(indices, found)
        return found


class Checksums:
    """The checksums of the images in a file, which may be damaged.

    Args:
        expected: (N,) as `checksums` returned them when the file was written.
        advice: what the user can do if an image has another checksum, for the error.
    """

    def __init__(self, expected: UInt64[np.ndarray, 'N'], advice: str):
        self._expected, self._advice, self._unread = expected, advice, np.ones(len(expected), bool)

    def require(self, indices: Any, images: UInt8[np.ndarray, '*batch H W C']) -> None:
        """Compare images that are read for the first time.

        Raises:
            UnreadableError: an image differs from the one that was written.
        """
        if not self._unread.any():
            return
        integers = isinstance(indices, np.ndarray) and indices.dtype != bool
        rows = np.ravel(indices if integers else np.arange(len(self._unread))[indices])
        images = np.reshape(images, (len(rows), *images.shape[-3:]))
        count = max(1, PART // math.prod(images.shape[1:]))
        for start in range(0, len(rows), count):
            part, found = rows[start : start + count], images[start : start + count]
            new = self._unread[part]
            if not new.all():  # otherwise this would only copy them
                part, found = part[new], found[new]
            if (checksums(found) != self._expected[part]).any():
                raise UnreadableError(self._advice)
            self._unread[part] = False


def checksums(images: UInt8[np.ndarray, 'N H W C']) -> UInt64[np.ndarray, 'N']:
    """Return Σ wᵢ·xᵢ mod 2⁶⁴ of each image, where wᵢ are fixed odd numbers.

    xᵢ are the bytes of the image, or its words of eight bytes if it has a multiple of eight. A flipped bit always
    changes the sum, and other damage almost always.
    """
    words = np.ascontiguousarray(images).reshape(len(images), math.prod(images.shape[1:]))
    words = words.view('<u8') if words.shape[1] % 8 == 0 else words.astype(np.uint64)
    return np.einsum('nw,w->n', words, _weights(words.shape[1]))


@functools.lru_cache(maxsize=4)
def _weights(count: int) -> UInt64[np.ndarray, 'count']:
    return np.random.Philox(np.random.SeedSequence(count)).random_raw(count) | np.uint64(1)


def labelled(images: Images, num_classes: int) -> Images:
    """Check that all images have labels, and add a SHA-256 of classes and labels to their record.

    Args:
        images: the images.
        num_classes: the number of classes that they must have.

    Returns:
        The same images.

    Raises:
        ValueError: there are no labels, an image has none, or there are more or fewer classes.
    """
    if images.shards:
        return join([labelled(shard, num_classes) for shard in images.shards])
    classes, labels = images.record['classes'], images.labels
    if labels is None:
        raise ValueError('these images have no classes, but data.labels=True: use images with classes, or labels=False')
    if len(classes) != num_classes:
        raise ValueError(f'these images have {len(classes)} classes, but model.num_classes is {num_classes}')
    if (labels < 0).any():
        raise ValueError(f'{(labels < 0).sum()} of {len(labels)} images have no class, but data.labels=True needs it')
    digest = labels_sha256(classes, labels)
    return dataclasses.replace(images, record=images.record | {'labels_sha256': digest})


def labels_sha256(classes: Sequence[str], labels: Int32[np.ndarray, 'N']) -> str:
    """Return a SHA-256 of the names of the classes and the label of each image."""
    return hashlib.sha256(json.dumps(list(classes)).encode() + labels.astype('<i4').tobytes()).hexdigest()


def join(shards: Sequence[Images]) -> Images:
    """Return the images of several shards, one shard after the other."""
    labels = [shard.labels for shard in shards if shard.labels is not None]
    record = join_records([shard.record for shard in shards])
    return Images(_Joined(shards), np.concatenate(labels) if labels else None, record, tuple(shards))


def join_records(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of all images of several shards.

    Its digests are digests of those of the shards; 'counts' are their numbers of images.
    """
    counts = [record['count'] for record in records]
    joined = records[0] | {
        'count': sum(counts),
        'counts': counts,
        'channel_means': np.average([record['channel_means'] for record in records], 0, counts).tolist(),
    }
    for key in ('sha256', 'labels_sha256'):
        if key in joined:
            joined[key] = hashlib.sha256(json.dumps([record[key] for record in records]).encode()).hexdigest()
    return joined


class _Joined:
    """The images of several shards, indexed like one array."""

    def __init__(self, shards: Sequence[Images]):
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])
        self.shape = (int(self._starts[-1]), *shards[0].images.shape[1:])
        self.dtype = np.dtype(np.uint8)
        self.nbytes = int(np.prod(self.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Any) -> UInt8[np.ndarray, '*batch H W C']:
        if isinstance(indices, np.ndarray) and indices.dtype != bool:
            rows = np.where(indices < 0, indices + len(self), indices)
        else:
            rows = np.arange(len(self))[indices]
        images = np.empty((*np.shape(rows), *self.shape[1:]), np.uint8)
        of_shard = np.searchsorted(self._starts, rows, side='right') - 1
        for shard in np.unique(of_shard):
            here = of_shard == shard
            images[here] = self._shards[shard][rows[here] - self._starts[shard]]
        return images


class Undecoded:
    """Images that are decoded whenever they are needed, for data sets that are too large for the disk.

    Every picture could be decoded when the data set was opened. If one cannot be read any more, the next readable
    picture of the same class replaces it, with a warning, so that a moved file does not end a run. Indexing raises
    UnreadableError after RETRIES unreadable pictures.

    Args:
        source: the pictures.
        preprocess: applied to each picture.
        good: (N,) indices of the usable pictures in the source.
        labels: (N,) their classes.
    """

    RETRIES = 20

    def __init__(
        self,
        source: Source,
        preprocess: Preprocessing,
        good: Int64[np.ndarray, 'N'],
        labels: Int32[np.ndarray, 'N'],
    ):
        self._source, self._preprocess, self._good, self._labels = source, preprocess, good, labels
        self._reported: set[int] = set()
        self.shape = (len(good), *preprocess.shape)
        self.dtype = np.dtype(np.uint8)
        self.nbytes = int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self._good)

    def __getitem__(self, indices: Any) -> UInt8[np.ndarray, '*batch H W C']:
        rows = np.arange(len(self))[indices]
        images = [self._decode(row) for row in np.ravel(rows)]
        return np.asarray(images, np.uint8).reshape(*np.shape(rows), *self.shape[1:])

    def _decode(self, row: int) -> UInt8[np.ndarray, 'H W C']:
        for candidate in self._like(row):
            i = int(self._good[candidate])
            try:
                return self._preprocess(self._source.read(i))
            except ValueError as error:
                reason = f'{self._source.names[i]!r} could be decoded before, but now {error}'
                if i not in self._reported:
                    self._reported.add(i)
                    say(f'warning: {reason}; the next picture replaces it')
        raise UnreadableError(
            f'{reason}; {self.RETRIES - 1} pictures before it failed as well: is the disk still there?'
        )

    def _like(self, row: int) -> Iterator[int]:
        """Yield the row, and then the next ones of its class."""
        yield row
        same = np.flatnonzero(self._labels == self._labels[row])
        yield from np.resize(np.roll(same, -1 - int(np.searchsorted(same, row))), self.RETRIES - 1).tolist()
