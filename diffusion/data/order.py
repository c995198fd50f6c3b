"""The order in which training sees the images."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

# The first word of every SeedSequence here, so that the order shares no random numbers with other uses of the seed.
DOMAIN = int.from_bytes(b'data')


class Order:
    """The images of each training step: `order[k]` holds their indices, a function of (seed, k) alone.

    Each epoch is a new permutation, in which every image occurs exactly once. If batch_size does not divide
    num_images, a batch at the end of an epoch is completed from the next epoch. Epoch e sorts the images by the
    random words of `Philox(SeedSequence([DOMAIN, seed, e, s]))`, where s is the shard, from 0.

    If the images are divided into several shards, a batch consists of equally many images of each, and each shard has
    its own epochs. A batch therefore depends on the number of shards, but not on how hosts share them: a host needs
    only the shards that its rows of a batch come from, see `own_shards`.

    Args:
        num_images: number of images of the training split; with several shards, of each shard that this host has.
        batch_size: images in a batch, summed over all hosts.
        seed: any integer of at most 32 bits, not negative.
        host: index of this host.
        hosts: number of hosts; each takes a part of the same batch, in the order of their indices.
        shards: number of shards, summed over all hosts.

    Raises:
        ValueError: hosts or shards do not divide batch_size, or num_images are not those of this host's shards.
    """

    def __init__(
        self,
        num_images: int | Sequence[int],
        batch_size: int,
        seed: int,
        *,
        host: int = 0,
        hosts: int = 1,
        shards: int = 1,
    ):
        if batch_size % hosts:
            raise ValueError(f'a batch of {batch_size} images cannot be divided evenly among {hosts} hosts')
        if batch_size % shards:
            raise ValueError(f'a batch of {batch_size} images cannot be divided evenly among {shards} shards')
        mine = own_shards(shards, host, hosts)
        sizes = [num_images] if isinstance(num_images, int) else list(num_images)
        if len(sizes) != len(mine):
            raise ValueError(f'num_images has {len(sizes)} sizes, but this host has {len(mine)} shards')
        self._sizes, self._starts = dict(zip(mine, sizes, strict=True)), np.cumsum([0, *sizes]).tolist()
        self._seed, self._of_each = seed, batch_size // shards
        share = batch_size // hosts
        # Row r of a batch is the place r mod (batch_size/shards) of the part of shard r // (batch_size/shards).
        rows = np.arange(host * share, (host + 1) * share)
        self._places = {shard: rows[rows // self._of_each == shard] % self._of_each for shard in mine}
        self._epoch = functools.lru_cache(maxsize=2 * len(mine))(self._permutation)

    def __getitem__(self, step: int) -> Int32[np.ndarray, 'share']:
        """Return the indices of this host's part of a batch, (batch_size / hosts,).

        Index i counts the images of this host's shards, one shard after the other.
        """
        parts = []
        for start, (shard, places) in zip(self._starts, self._places.items(), strict=False):
            epochs, places = np.divmod(step * self._of_each + places, self._sizes[shard])
            parts += [start + self._epoch(shard, int(e))[places[epochs == e]] for e in np.unique(epochs)]
        return np.concatenate(parts, dtype=np.int32)

    def _permutation(self, shard: int, epoch: int) -> Int32[np.ndarray, 'num_images']:
        # The raw words of Philox are the same in every version of NumPy; its shuffles may change. SeedSequence takes a
        # last word of 0 for none.
        words = np.random.SeedSequence([DOMAIN, self._seed, epoch, shard])
        return np.argsort(np.random.Philox(words).random_raw(self._sizes[shard]), kind='stable').astype(np.int32)


def own_shards(shards: int, host: int, hosts: int) -> range:
    """Return the shards that a host's rows of each batch come from. Neighbouring hosts may have one in common.

    Host h of H has the rows from h/H to (h+1)/H of a batch, and shard s of S the rows from s/S to (s+1)/S. The host
    therefore has the shards from ⌊h·S/H⌋ to ⌈(h+1)·S/H⌉ − 1.
    """
    return range(host * shards // hosts, -(-(host + 1) * shards // hosts))
