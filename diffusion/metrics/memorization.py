"""Finds samples that are copies of training images, by comparison with the distances of held-out images."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Real

from diffusion.metrics.neighbours import nearest

TAIL = 0.3  # fraction of the held-out images whose distances give the shape of the null's lower tail
FEWEST = 4  # of these images at least: the shape is also estimated from half of them, a quarter, …
LEVEL = 0.05  # probability that independent images raise an alarm, over all samples and spaces


class Report(NamedTuple):
    """The distances of samples to training images in one feature space.

    Attributes:
        distances: (N,) of each sample to its nearest training image, Euclidean.
        indices: (N,) of that training image.
        p_values: (N,) the probability that a held-out image comes as near; None without held-out images.
        copies: indices of the samples that are nearer than chance allows, the least probable first.
        medians: the median distance of the samples, and that of the held-out images or None.
    """

    distances: Float64[np.ndarray, 'N']
    indices: Int64[np.ndarray, 'N']
    p_values: Float64[np.ndarray, 'N'] | None
    copies: list[int]
    medians: tuple[float, float | None]


def report(
    samples: Real[np.ndarray, 'N D'],
    training: Real[np.ndarray, 'M D'],
    held_out: Real[np.ndarray, 'H D'] | None,
    *,
    level: float = LEVEL,
) -> Report:
    """Find samples that are nearer to a training image than independent images are.

    The null distribution is that of the distances of held-out images to their nearest training image. Small distances
    follow a power law P(d < r) ∝ r^m, where m is the local dimension (Levina & Bickel 2004), so log(r/d) is exponential
    below a quantile r. If k of H held-out images are below r, and the mean is estimated from them, the distance of a
    new image is below d with probability

        p = (k+1)/(H+1) · (1 + log(r/d)/(k·mean))^−k,

    which accounts for the error of that mean. Near-duplicates in the data make the tail heavier near 0. Therefore p is
    computed for several k, from 30 % of the held-out images down to a few, and the largest is taken. If n ≥ 1 held-out
    images are as near as the sample, p is (n+1)/(H+1) instead. Held-out images at distance 0, which are copies
    themselves, have no part in the means.

    A sample is called a copy if N·p ≤ level. The probability that N independent samples contain a supposed copy is then
    at most `level`.

    Args:
        samples: (N, D).
        training: (M, D).
        held_out: (H, D) images that were not trained on; None if there are none, and then no sample is called a copy.
        level: the largest probability of finding a copy if the samples are independent of the training images.

    Returns:
        The report.
    """
    found = nearest(samples, training, 1)
    distances, indices = found.distances[:, 0], found.indices[:, 0]
    median = float(np.median(distances))
    if held_out is None or len(held_out) < 2:
        return Report(distances, indices, None, [], (median, None))
    null = np.sort(nearest(held_out, training, 1).distances[:, 0])
    p = tail_probabilities(distances, null)
    order = np.argsort(p, kind='stable')
    copies = [int(i) for i in order if len(samples) * p[i] <= level]
    return Report(distances, indices, p, copies, (median, float(np.median(null))))


def tail_probabilities(distances: Float64[np.ndarray, 'N'], null: Float64[np.ndarray, 'H']) -> Float64[np.ndarray, 'N']:
    """Return the probability that a distance of the null distribution is at most each distance, see `report`.

    Args:
        distances: (N,), at least 0.
        null: (H,) sorted distances of held-out images, at least two.
    """
    ranks = np.searchsorted(null, distances, side='right')
    by_rank = (ranks + 1) / (len(null) + 1)
    apart = null[null > 0]
    by_tail = []
    count = min(math.ceil(TAIL * len(null)), len(apart) - 1)
    while count >= 1:
        mean = np.log(apart[count] / apart[:count]).mean()
        if mean > 0:  # else these distances are equal, and have no shape
            with np.errstate(divide='ignore'):
                beyond = np.maximum(np.log(apart[count] / distances), 0)
            below = (len(null) - len(apart) + count + 1) / (len(null) + 1)
            by_tail.append(below * (1 + beyond / (count * mean)) ** -count)
        count = count // 2 if count >= 2 * FEWEST else 0
    if not by_tail:
        return by_rank
    return np.where(ranks > 0, by_rank, np.minimum(np.max(by_tail, axis=0), by_rank))
