"""Where images come from: uint8 arrays (N, H, W, C), and the order in which training sees them."""

import grain
import numpy as np

SPLITS = ('train', 'test')


def digits(split):
    """scikit-learn's 1,797 handwritten digits, 8×8, their 17 grey levels spread over 0 … 255.

    Every sixth image, 299 in all, is the test split, so that all writers are in both.
    """
    from sklearn.datasets import load_digits

    images = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
    test = np.arange(len(images)) % 6 == 5
    return images[test if split == 'test' else ~test]


SOURCES = {'digits': digits}


def load(source, split='train', *, image_size, channels, crop=''):
    """The images of one split, uint8 (N, image_size, image_size, channels).

    Raises ValueError where the source is not known, or its images are not of that shape.
    """
    if source not in SOURCES:
        raise ValueError(f'there is no data source {source!r} here; the sources are: {", ".join(SOURCES)}')
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}, but must be one of {", ".join(SPLITS)}')
    if crop:
        raise ValueError(f'the images of {source!r} are not cropped: leave data.crop empty (it is {crop!r})')
    images = SOURCES[source](split)
    shape = (image_size, image_size, channels)
    if images.shape[1:] != shape:
        raise ValueError(
            f'the images of {source!r} have the shape {images.shape[1:]}, but '
            f'data.image_size={image_size} and data.channels={channels} ask for {shape}'
        )
    return images


def order(num_images, batch_size, seed):
    """The images of each training step: order[k] is (batch_size,) indices, a function of (seed, k) alone.

    Each epoch is a fresh permutation, in which every image comes exactly once; where batch_size does not
    divide num_images, a batch takes its rest from the next epoch.
    """
    # Grain shuffles epoch e with seed + e: neighbouring seeds are first taken far from each other.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0]) >> 1
    return grain.MapDataset.range(num_images).shuffle(seed=seed).repeat().batch(batch_size)


def to_float(images):
    """uint8 0 … 255 to float32 in [−1, 1]: x = u/127.5 − 1."""
    return images / np.float32(127.5) - np.float32(1)


def to_uint8(images):
    """[−1, 1] to uint8 0 … 255, rounded to the nearest (cutting off would darken by half a level)."""
    return np.round(np.clip((np.asarray(images) + 1) * 127.5, 0, 255)).astype(np.uint8)
