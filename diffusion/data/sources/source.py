"""What every source of pictures provides."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

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
    """

    names: Sequence[str]
    read: Callable[[int], UInt8[np.ndarray, 'H W C']]
    identity: Any
    label: Callable[[int], int | None] = unlabelled
    classes: Sequence[str] | None = None
    encoded: Callable[[int], bytes] | None = None
    about: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.names)
