"""The handwritten digits that scikit-learn ships."""

import hashlib

import numpy as np

from diffusion.data.sources.source import Source


def open_digits(place: str, split: str, data_dir: str = '') -> Source:
    """Open scikit-learn's handwritten digits: 8×8 pixels, grey, labelled.

    Their levels 0 … 16 are spread over 0 … 255 by round(level · 255/16). Every sixth image is in the test split, so
    that both splits contain every writer.

    Args:
        place: must be ''.
        split: 'train' or 'test'.
        data_dir: not used.

    Returns:
        The digits of the split.

    Raises:
        ValueError: a place is given, or there is no such split.
    """
    from sklearn.datasets import load_digits  # slow to import

    if place:
        raise ValueError(f"source is 'digits:{place}', but the digits have no place: use 'digits'")
    if split not in ('train', 'test'):
        raise ValueError(f'split is {split!r}, but the digits have only train and test')
    everything = load_digits()
    in_test = np.arange(len(everything.images)) % 6 == 5
    chosen = np.flatnonzero(in_test if split == 'test' else ~in_test)
    images = np.round(everything.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
    labels = everything.target[chosen].tolist()
    return Source(
        names=[f'digit {i}' for i in chosen],
        read=images.__getitem__,
        identity=['digits', hashlib.sha256(images).hexdigest()],
        label=labels.__getitem__,
        classes=[str(name) for name in everything.target_names],
    )
