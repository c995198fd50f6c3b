"""The colour drift of samples: their channel means against those of the data."""

import numpy as np
from jaxtyping import Float, Float64, UInt8

VISIBLE = 0.05  # in units of [−1, 1]; a smaller drift cannot be seen


def drift(
    images: UInt8[np.ndarray, 'N H W C'], data_means: Float[np.ndarray, 'C'] | list[float]
) -> tuple[Float64[np.ndarray, 'C'], str | None]:
    """Compare the channel means of samples with those of the data.

    It warns if the mean of a channel differs by more than VISIBLE and by more than four standard errors, which are
    estimated from the means of the individual images.

    Args:
        images: (N, H, W, C) samples, in 0 … 255.
        data_means: (C,) channel means of the data, in 0 … 255.

    Returns:
        The difference of each channel mean from the data's, (C,) in units of [−1, 1]; and a warning or None.
    """
    means = images.mean(axis=(1, 2), dtype=np.float64) / 127.5 - 1
    difference = means.mean(axis=0) - (np.asarray(data_means) / 127.5 - 1)
    standard_error = means.std(axis=0) / np.sqrt(len(images))
    if (np.abs(difference) <= np.maximum(4 * standard_error, VISIBLE)).all():
        return difference, None
    listed = ', '.join(f'{value:+.3f}' for value in difference)
    return difference, f'the colours are off: the channel means differ from the data by {listed} in units of [−1, 1]'
