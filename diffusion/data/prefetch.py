"""Gather the batches of training ahead of the steps that need them."""

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from diffusion.data.images import Images
from diffusion.data.order import Order

BATCHES_AHEAD = 16


def prefetch(images: Images, order: Order, start: int, stop: int) -> Iterator[UInt8[np.ndarray, 'B H W C']]:
    """Iterate over the batches `images[order[k]]` for start ≤ k < stop, gathered ahead by Grain's threads.

    Args:
        images: the images of one split.
        order: the indices of each step.
        start: first step.
        stop: step after the last.

    Returns:
        An iterator over uint8 batches (B, H, W, C), where B is the length of `order[k]`.
    """
    import grain  # slow to import, and training from device memory does not need it

    batches = grain.MapDataset.source(_Batches(images, order, start, stop))
    threads = min(16, 2 * (os.cpu_count() or 1))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=BATCHES_AHEAD)))


@dataclasses.dataclass(frozen=True)
class _Batches:
    """A random-access data source, as Grain defines it."""

    images: Images
    order: Order
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> UInt8[np.ndarray, 'B H W C']:
        return self.images[self.order[self.start + i]]
