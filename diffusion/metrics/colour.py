"""Whether samples have the colours of the data: diffusion models are known to drift off, all of them alike."""

import numpy as np

SEEN = 0.05  # of −1 … 1: a drift that a person sees


def drift(images, data_means):
    """How far the mean of each channel is from the data's: (C,) in units of [−1, 1]; and a warning, or None.

    It warns where that is beyond four standard errors of the images' own means, and beyond SEEN.

    images: (N, H, W, C) uint8; data_means: (C,), in 0 … 255.
    """
    means = images.mean(axis=(1, 2), dtype=np.float64) / 127.5 - 1
    off = means.mean(axis=0) - (np.asarray(data_means) / 127.5 - 1)
    error = means.std(axis=0) / np.sqrt(len(images))
    if (np.abs(off) <= np.maximum(4 * error, SEEN)).all():
        return off, None
    found = ', '.join(f'{value:+.3f}' for value in off)
    return off, f'the colours of the samples are off: channel means differ from the data by {found} (of −1 … 1)'
