"""The order in which training sees the images."""

import functools

import numpy as np
from jaxtyping import Int32

# The first word of every SeedSequence here, so that the order shares no random numbers with other uses of the seed.
DOMAIN = int.from_bytes(b'data')


class Order:
    """The images of each training step: `order[k]` holds their indices, a function of (seed, k) alone.

    Each epoch is a new permutation, in which every image occurs exactly once. If batch_size does not divide
    num_images, a batch at the end of an epoch is completed from the next epoch. Epoch e sorts the images by the
    random words of `Philox(SeedSequence([DOMAIN, seed, e]))`.

    Args:
        num_images: number of images of the training split.
        batch_size: images in a batch, summed over all hosts.
        seed: any integer of at most 32 bits, not negative.
        host: index of this host.
        hosts: number of hosts; each takes a part of the same batch, in the order of their indices.

    Raises:
        ValueError: hosts does not divide batch_size.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, *, host: int = 0, hosts: int = 1):
        if batch_size % hosts:
            raise ValueError(f'a batch of {batch_size} images cannot be divided evenly among {hosts} hosts')
        self._num_images, self._batch_size, self._seed = num_images, batch_size, seed
        share = batch_size // hosts
        self._part = np.arange(host * share, (host + 1) * share)
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def __getitem__(self, step: int) -> Int32[np.ndarray, 'share']:
        """Return the indices of this host's part of a batch, (batch_size / hosts,) in 0 … num_images − 1."""
        epochs, places = np.divmod(step * self._batch_size + self._part, self._num_images)
        return np.concatenate([self._epoch(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])

    def _permutation(self, epoch: int) -> Int32[np.ndarray, 'num_images']:
        # The raw words of Philox are the same in every version of NumPy; its shuffles may change.
        words = np.random.Philox(np.random.SeedSequence([DOMAIN, self._seed, epoch])).random_raw(self._num_images)
        return np.argsort(words, kind='stable').astype(np.int32)
