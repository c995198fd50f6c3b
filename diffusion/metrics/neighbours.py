"""Nearest neighbours among many vectors, computed in blocks, so that not all distances are in memory."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64, Real

BLOCK = 2048  # vectors of either set whose distances are in memory at a time
SPARE = 4  # additional candidates, because float32 may misplace some


class Neighbours(NamedTuple):
    """The k nearest vectors of a set, the nearest first.

    Attributes:
        distances: (N, k), Euclidean.
        indices: (N, k), into the set.
    """

    distances: Float64[np.ndarray, 'N k']
    indices: Int64[np.ndarray, 'N k']


def squared_distances(x: Float[np.ndarray, 'N D'], y: Float[np.ndarray, 'M D']) -> Float[np.ndarray, 'N M']:
    """Compute |x − y|² = |x|² − 2xᵀy + |y|² for every pair.

    Args:
        x: (N, D).
        y: (M, D).

    Returns:
        (N, M), at least 0.
    """
    result = x @ y.T
    result *= -2
    result += np.einsum('nd,nd->n', x, x)[:, None]
    result += np.einsum('md,md->m', y, y)
    return np.maximum(result, 0, out=result)


def nearest(x: Real[np.ndarray, 'N D'], y: Real[np.ndarray, 'M D'], k: int, *, same: bool = False) -> Neighbours:
    """Find the k nearest vectors of y to each of x.

    Candidates are found by matrix products in float32; their distances and their order are then computed in float64.

    Args:
        x: (N, D) of any real type.
        y: (M, D), which may be a memory-mapped file.
        k: the number of neighbours.
        same: whether x and y are the same set, so that no vector is its own neighbour.

    Returns:
        The neighbours of each of the N vectors.

    Raises:
        ValueError: y has too few vectors.
    """
    if k > len(y) - same:
        raise ValueError(f'{k} neighbours are asked for, but there are {len(y) - same}')
    spare = min(k + same + SPARE, len(y))
    center = np.asarray(y[:BLOCK], np.float64).mean(axis=0)  # a common shift, so that float32 loses fewer digits
    distances, indices = np.empty((len(x), k)), np.empty((len(x), k), np.int64)
    for start in range(0, len(x), BLOCK):
        rows = np.asarray(x[start : start + BLOCK], np.float64)
        narrow = (rows - center).astype(np.float32)
        near = np.empty((len(rows), 0), np.float32)
        candidates = np.empty((len(rows), 0), np.int64)
        for first in range(0, len(y), BLOCK):
            block = squared_distances(narrow, (np.asarray(y[first : first + BLOCK], np.float64) - center).astype('f4'))
            there = np.broadcast_to(np.arange(first, first + block.shape[1]), block.shape)
            near, candidates = _least(
                np.concatenate([near, block], axis=1), np.concatenate([candidates, there], axis=1), spare
            )
        exact = np.stack([np.linalg.norm(row - y[found], axis=1) for row, found in zip(rows, candidates, strict=True)])
        if same:
            exact[candidates == start + np.arange(len(rows))[:, None]] = np.inf
        order = np.argsort(exact, axis=1, kind='stable')[:, :k]
        distances[start : start + BLOCK] = np.take_along_axis(exact, order, axis=1)
        indices[start : start + BLOCK] = np.take_along_axis(candidates, order, axis=1)
    return Neighbours(distances, indices)


def _least(values, labels, count):
    """The `count` least values of each row, in any order, and their labels."""
    if values.shape[1] <= count:
        return values, labels
    chosen = np.argpartition(values, count - 1, axis=1)[:, :count]
    return np.take_along_axis(values, chosen, axis=1), np.take_along_axis(labels, chosen, axis=1)
