"""Precision and recall, density and coverage: how much two sets of vectors overlap, judged by neighbourhoods."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from diffusion.metrics.frechet import standard_error
from diffusion.metrics.neighbours import nearest, squared_distances

K = 3  # neighbours: ADM's choice for precision and recall
ROWS = 512  # vectors of the reference whose distances to all samples are in memory at a time


class Estimate(NamedTuple):
    """A value, and its standard error over new samples; the reference is fixed.

    Attributes:
        value: the value.
        standard_error: of the value.
        influences: (N,), of each sample on the value.
    """

    value: float
    standard_error: float
    influences: Float64[np.ndarray, 'N']


class Manifold(NamedTuple):
    """The four estimates of `manifold`.

    Attributes:
        precision: the fraction of samples in the neighbourhood of a reference vector.
        recall: the fraction of reference vectors in the neighbourhood of a sample.
        density: the mean number of neighbourhoods of reference vectors that contain a sample, divided by k.
        coverage: the fraction of reference vectors with a sample in their neighbourhood.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def manifold(samples: Float[np.ndarray, 'N D'], reference: Float[np.ndarray, 'M D'], k: int = K) -> Manifold:
    """Compute precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797).

    The neighbourhood of a vector is the closed ball that reaches its k-th nearest neighbour in its own set. The
    samples are independent, so precision and density are means of independent values; recall and coverage have the
    jackknife's standard error, which leaves out one sample at a time.

    Args:
        samples: (N, D).
        reference: (M, D).
        k: the number of neighbours.

    Returns:
        The four estimates.

    Raises:
        ValueError: a set has fewer than k + 2 vectors.
    """
    if min(len(samples), len(reference)) < k + 2:
        raise ValueError(f'neighbourhoods of {k} neighbours need at least {k + 2} vectors in both sets')
    of_samples = nearest(samples, samples, k + 1, same=True)
    radii = nearest(reference, reference, k, same=True).distances[:, -1]
    balls = np.empty(len(samples), np.int64)  # reference balls around each sample
    alone = np.zeros(len(samples), np.int64)  # reference vectors whose ball holds this sample alone
    covered = np.empty(len(reference), bool)
    recalled = np.empty(len(reference), bool)
    gains = np.zeros(len(samples))  # reference vectors that recall would gain without this sample, less those it loses
    balls[:] = 0
    exact = np.asarray(samples, np.float64)  # so that a vector at the border of a ball is inside
    for start in range(0, len(reference), ROWS):
        rows = slice(start, start + ROWS)
        distances = np.sqrt(squared_distances(np.asarray(reference[rows], np.float64), exact))
        inside = distances <= radii[rows, None]
        balls += inside.sum(axis=0)
        covered[rows] = inside.any(axis=1)
        alone += inside[inside.sum(axis=1) == 1].sum(axis=0)
        recalled[rows] = (distances <= of_samples.distances[:, k - 1]).any(axis=1)
        gains += _gains(distances, of_samples.distances, of_samples.indices, k)
    return Manifold(
        precision=_proportion(balls > 0),
        recall=_jackknife(recalled, gains / len(reference)),
        density=Estimate(float(balls.mean() / k), float(np.std(balls / k) / np.sqrt(len(balls))), _centered(balls / k)),
        coverage=_jackknife(covered, -alone / len(reference)),
    )


def _gains(
    distances: Float64[np.ndarray, 'rows N'],
    neighbour_distances: Float64[np.ndarray, 'N k+1'],
    neighbours: Int64[np.ndarray, 'N k+1'],
    k: int,
) -> Float64[np.ndarray, 'N']:
    """For each sample: the number of rows that recall would gain without it, minus the number that it would lose.

    Without sample i its own ball is gone, and each ball that has i among its k neighbours grows to the next neighbour.
    """
    gains = np.zeros(len(neighbours))
    inside = distances <= neighbour_distances[:, k - 1]
    counts = inside.sum(axis=1)
    grown = (distances <= neighbour_distances[:, k]) & ~inside
    rows, balls = np.nonzero(grown & (counts <= 1)[:, None])
    # (row, sample without which the row lies in a ball that has grown), each once
    rescued = np.unique(np.stack([rows.repeat(k), neighbours[balls, :k].ravel()]), axis=1)
    new = counts[rescued[0]] == 0
    np.add.at(gains, rescued[1, new], 1)
    (single,) = np.nonzero(counts == 1)
    only = inside[single].argmax(axis=1)  # the one sample whose ball holds the row
    np.add.at(gains, only, -1)
    first = inside.argmax(axis=1)
    kept = (counts[rescued[0]] == 1) & (first[rescued[0]] == rescued[1])
    np.add.at(gains, rescued[1, kept], 1)
    return gains


def _proportion(inside: Bool[np.ndarray, 'N']) -> Estimate:
    """The fraction of true values. Its error counts one more success and failure, so that it is not 0 at 0 and 1."""
    smoothed = (inside.sum() + 1) / (len(inside) + 2)
    error = float(np.sqrt(smoothed * (1 - smoothed) / len(inside)))
    return Estimate(float(inside.mean()), error, _centered(inside))


def _jackknife(inside: Bool[np.ndarray, 'M'], changes: Float64[np.ndarray, 'N']) -> Estimate:
    """The fraction of true values, with the jackknife's error: from its change when each of N samples is left out."""
    influences = (1 - len(changes)) * _centered(changes)
    return Estimate(float(inside.mean()), standard_error(influences), influences)


def _centered(values):
    return values - values.mean()
