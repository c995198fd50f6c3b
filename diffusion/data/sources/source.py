"""What every source of pictures provides."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from diffusion.util import json_sha256

LARGE = 64 * 2**20  # bytes; larger files and records are in memory one at a time
one_large = threading.Lock()


def unlabelled(i: int) -> None:
    """Return None, the label of every picture in a source without labels."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The pictures of one split. Its functions take a picture's index and may be called from several threads.

    Attributes:
        names: the name of each picture, for messages.
        read: returns the picture as a uint8 array (H, W, 1 or 3), in 0 … 255. Raises ValueError if the picture cannot
            be read; the message is a predicate, such as 'is empty'.
        identity: JSON that changes whenever the pictures may have changed; the cache of decoded images depends on it.
        label: returns an index into `classes`, or None.
        classes: the names of the labels; None if there are no labels.
        encoded: returns the bytes of the picture's file, for sources that have files. Raises ValueError as `read`.
        about: lines for the user that describe what was found and left out.
        everywhere: `identity` without what differs between copies of the same pictures on two hosts, such as times of
            modification; None if nothing does.
    """

    names: Sequence[str]
    read: Callable[[int], UInt8[np.ndarray, 'H W C']]
    identity: Any
    label: Callable[[int], int | None] = unlabelled
    classes: Sequence[str] | None = None
    encoded: Callable[[int], bytes] | None = None
    about: Sequence[str] = ()
    everywhere: Any = None

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def sha256(self) -> str:
        """A digest of `identity` and `classes`."""
        return _sha256([self.identity, self.classes])

    @functools.cached_property
    def sha256_everywhere(self) -> str:
        """The same of `everywhere`: equal on two hosts if they seem to have the same pictures."""
        return _sha256([self.identity if self.everywhere is None else self.everywhere, self.classes])


def shard(source: Source, number: int, count: int) -> Source:
    """Return one of `count` parts of a source of N pictures: those from ⌊number·N/count⌋ to ⌊(number+1)·N/count⌋ − 1.

    Consecutive pictures are mostly in the same files, which only the hosts of this part read.

    Args:
        source: the pictures.
        number: of the part, from 0.
        count: number of parts. If it is 1, the source itself is returned.
    """
    if count == 1:
        return source
    start, stop = (i * len(source) // count for i in (number, number + 1))
    encoded = source.encoded
    return dataclasses.replace(
        source,
        names=source.names[start:stop],
        read=lambda i: source.read(start + i),
        identity=[source.sha256, number, count],
        label=lambda i: source.label(start + i),
        encoded=(lambda i: encoded(start + i)) if encoded else None,
        everywhere=[source.sha256_everywhere, number, count],
    )


def _sha256(described: Any) -> str:
    return json_sha256(described)
