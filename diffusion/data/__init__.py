"""Where images come from: uint8 arrays (N, H, W, C), and the order in which training sees them."""

import collections
import dataclasses
import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from diffusion.data.cache import Images, decoded
from diffusion.data.pictures import Preprocessing, decode
from diffusion.data.sources import open_source


def load(
    source,
    split='train',
    *,
    image_size,
    channels,
    crop='',
    data_dir='',
    cache=True,
    cache_dir='',
    max_bad_fraction=0.01,
):
    """The Images of one split: uint8 (N, image_size, image_size, channels), labels where there are any.

    source: 'digits', 'folder:PATH' (or a zip file), 'tfds:NAME'. Pictures are decoded once, into cache_dir
    ('' is $XDG_CACHE_HOME/diffusion), unless cache is False.
    Raises ValueError where there are no such images, with what was looked for and how to get it.
    """
    if source == 'digits':
        return digits(split, image_size=image_size, channels=channels, crop=crop)
    preprocess = Preprocessing(crop, image_size, channels)
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f'max_bad_fraction is {max_bad_fraction}, but must lie in [0, 1]')
    images = decoded(
        open_source(source, split, data_dir),
        preprocess,
        directory=os.path.expanduser(cache_dir) or default_cache(),
        max_bad_fraction=max_bad_fraction,
        keep=cache,
    )
    if not len(images):
        raise ValueError(f'there are no images in {source!r}')
    return images


class Survey(NamedTuple):
    """What pictures are like before any preprocessing, from an evenly spaced sample of them."""

    count: int  # of all pictures
    seen: int  # of them looked at
    bad: list  # (name, reason) of those seen that cannot be decoded or are not of the size asked
    sizes: collections.Counter  # of (height, width), of those decoded
    grey: int  # of those decoded, without colour
    images: np.ndarray | None  # (n, H, W, C) uint8: those seen, preprocessed


def survey(source, split='train', *, image_size=0, channels=0, crop='', data_dir='', most=1000):
    """Look at up to `most` pictures of a source, without its cache: seconds, however many there are.

    With image_size=0 they are not preprocessed. Raises ValueError as `load`.
    """
    if source == 'digits':
        images = digits(split, image_size=image_size or 8, channels=channels or 1, crop=crop).images
        return Survey(len(images), len(images), [], collections.Counter({(8, 8): len(images)}), len(images), images)
    preprocess = Preprocessing(crop, image_size, channels) if image_size else None
    pictures = open_source(source, split, data_dir)
    numbers = np.unique(np.linspace(0, len(pictures) - 1, min(most, len(pictures))).round().astype(int))

    def look(i):
        """(height, width), whether it is grey, the image: each None where there is none; and why not."""
        size = is_grey = None
        try:
            picture = decode(pictures.read(i)[0])
            size, is_grey = picture.size[::-1], _is_grey(picture)
            return size, is_grey, preprocess and preprocess.apply(picture), None
        except ValueError as error:
            return size, is_grey, None, (pictures.names[i], str(error))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = zip(*pool.map(look, map(int, numbers)), strict=True)
    sizes, grey, images, bad = ([one for one in part if one is not None] for part in found)
    images = np.asarray(images) if images else None
    return Survey(len(pictures), len(numbers), bad, collections.Counter(sizes), sum(grey), images)


def _is_grey(picture):
    pixels = np.asarray(picture)
    return picture.mode == 'L' or bool((pixels == pixels[..., :1]).all())


def default_cache():
    """Where decoded images are kept: $XDG_CACHE_HOME/diffusion."""
    return os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'diffusion')


def digits(split, *, image_size=8, channels=1, crop=''):
    """scikit-learn's 1,797 handwritten digits, 8×8, their 17 grey levels spread over 0 … 255.

    Every sixth image, 299 in all, is the test split, so that all writers are in both.
    """
    from sklearn.datasets import load_digits

    if split not in ('train', 'test'):
        raise ValueError(f'split is {split!r}, but the digits have train and test')
    if (image_size, channels, crop) != (8, 1, ''):
        raise ValueError(
            f'image_size={image_size}, channels={channels}, crop={crop!r} are asked for, but the digits are '
            "8×8 and grey, and are not cropped: image_size=8, channels=1, crop=''"
        )
    everything = load_digits()
    images = np.round(everything.images * (255 / 16)).astype(np.uint8)[..., None]
    test = np.arange(len(images)) % 6 == 5
    chosen = test if split == 'test' else ~test
    images = images[chosen]
    record = {
        'count': len(images),
        'classes': [str(name) for name in everything.target_names],
        'preprocessing': {'levels': '0 … 16 to round(level·255/16)'},
        'fingerprint': 'digits',
        'channel_means': images.mean(axis=(0, 1, 2)).tolist(),
        'sha256': hashlib.sha256(images).hexdigest(),
    }
    return Images(images, everything.target[chosen].astype(np.int32), record)


class Order:
    """The images of each training step: order[k] is indices, a function of (seed, k) alone.

    Each epoch is a fresh permutation, in which every image comes exactly once; where batch_size does not
    divide num_images, a batch takes its rest from the next epoch. Of several hosts each takes its own part of
    the same batch, the first host the first part: (batch_size/hosts,) int32.
    """

    def __init__(self, num_images, batch_size, seed, *, host=0, hosts=1):
        if batch_size % hosts:
            raise ValueError(f'a batch of {batch_size} images cannot be shared evenly by {hosts} hosts')
        self._num_images, self._seed = num_images, seed
        self._first, self._size, self._batch = host * batch_size // hosts, batch_size // hosts, batch_size
        self._epoch = functools.lru_cache(maxsize=2)(self._permute)

    def __getitem__(self, step):
        position = step * self._batch + self._first + np.arange(self._size)
        epochs, places = np.divmod(position, self._num_images)
        first, last = int(epochs[0]), int(epochs[-1])
        return np.concatenate([self._epoch(e)[places[epochs == e]] for e in range(first, last + 1)])

    def _permute(self, epoch):
        # Sorted random words, not a library's shuffle: the bits of Philox are the same in every version of NumPy.
        seed = np.random.SeedSequence([self._seed, epoch])
        return np.argsort(np.random.Philox(seed).random_raw(self._num_images), kind='stable').astype(np.int32)


def prefetch(images, order, start, stop):
    """The batches images[order[k]] for start ≤ k < stop, one after the other, gathered ahead by Grain's threads."""
    import grain  # takes a second, which only this needs

    return iter(
        grain.MapDataset.source(_Batches(images, order, start, stop)).to_iter_dataset(
            grain.ReadOptions(num_threads=min(16, 2 * (os.cpu_count() or 1)), prefetch_buffer_size=16)
        )
    )


@dataclasses.dataclass(frozen=True)
class _Batches:
    """What Grain calls a random-access data source."""

    images: Images
    order: Order
    start: int
    stop: int

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, i):
        return self.images[self.order[self.start + i]]


def to_float(images):
    """uint8 0 … 255 to float32 in [−1, 1]: x = u/127.5 − 1."""
    return images / np.float32(127.5) - np.float32(1)


def to_uint8(images):
    """[−1, 1] to uint8 0 … 255, rounded to the nearest (cutting off would darken by half a level)."""
    return np.round(np.clip((np.asarray(images) + 1) * 127.5, 0, 255)).astype(np.uint8)
