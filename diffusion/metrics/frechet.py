"""The Fréchet distance between the Gaussians that are fitted to two sets of vectors.

FID is this distance between the features of a certain network. Between raw pixels it is another number, useful for
small images, and not an FID.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float64, Shaped

Moments = tuple[Float64[np.ndarray, 'D'], Float64[np.ndarray, 'D D']]  # mean and covariance


class Sums(NamedTuple):
    """What is known of some vectors after they were seen once; the sums of two sets add up by `merge`.

    Attributes:
        n: N, the number of vectors.
        mean: (D,) float64.
        scatter: (D, D) float64, Σ_i (x_i − mean)(x_i − mean)ᵀ.
    """

    n: int
    mean: Float64[np.ndarray, 'D']
    scatter: Float64[np.ndarray, 'D D']

    def moments(self) -> Moments:
        """Return the mean (D,), and the covariance (D, D) with divisor N − 1.

        Raises:
            ValueError: there are fewer than two vectors.
        """
        if self.n < 2:
            raise ValueError(f'a covariance needs at least 2 vectors, but there are {self.n}')
        return self.mean, self.scatter / (self.n - 1)


NOTHING = Sums(0, np.zeros(()), np.zeros(()))


def sums(vectors: Shaped[np.ndarray, 'N ...']) -> Sums:
    """Sum up one batch in float64.

    Args:
        vectors: (N, …) of any real type, N ≥ 1, flattened to (N, D).

    Returns:
        The sums.
    """
    flat = np.asarray(vectors, np.float64).reshape(len(vectors), -1)
    mean = flat.mean(axis=0)
    centered = flat - mean
    return Sums(len(flat), mean, centered.T @ centered)


def merge(a: Sums, b: Sums) -> Sums:
    """Return the sums of two sets of vectors together.

    S = S_a + S_b + (m_b − m_a)(m_b − m_a)ᵀ·N_a·N_b/(N_a + N_b)                        Chan, Golub & LeVeque 1979

    Args:
        a: the sums of one set, or `NOTHING`.
        b: the sums of another set, not empty.

    Raises:
        ValueError: the vectors of the two sets differ in size.
    """
    if a.n and a.mean.shape != b.mean.shape:
        raise ValueError(f'vectors of {a.mean.size} and of {b.mean.size} values have no common covariance')
    n = a.n + b.n
    shift = b.mean - a.mean
    scatter = np.outer(shift, shift)
    scatter *= a.n * b.n / n
    scatter += a.scatter
    scatter += b.scatter
    return Sums(n, a.mean + shift * (b.n / n), scatter)


def moments(batches: Iterable[Shaped[np.ndarray, 'n ...']]) -> Moments:
    """Compute the mean and the covariance of a stream of vectors in float64.

    Memory holds one batch and a few matrices (D, D), however many vectors there are.

    Args:
        batches: arrays (n, …) of any real type, flattened to (n, D); n may differ and may be 0.

    Returns:
        The mean (D,), and the covariance (D, D) with divisor N − 1, N the number of all vectors.

    Raises:
        TypeError: `batches` is a single array.
        ValueError: there are fewer than two vectors, or they differ in size.
    """
    if hasattr(batches, 'shape'):
        raise TypeError('batches is one array, but must be several; moments([array]) takes it as one batch')
    return functools.reduce(merge, (sums(batch) for batch in batches if len(batch)), NOTHING).moments()


def distance(moments1: Moments, moments2: Moments) -> float:
    """Compute the squared 2-Wasserstein distance between two Gaussians.

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½)    (Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500, Eq. 6)

    The trace of the root equals that of (Σ₁^½ Σ₂ Σ₁^½)^½. This matrix is symmetric, so singular covariances (constant
    pixels, fewer vectors than dimensions) need no special treatment.

    Args:
        moments1: mean (D,) and covariance (D, D).
        moments2: the same.

    Returns:
        The squared distance, in squared units of the vectors.
    """
    (mean1, covariance1), (mean2, covariance2) = moments1, moments2
    values, vectors = scipy.linalg.eigh(covariance1)
    root1 = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = scipy.linalg.eigvalsh(root1 @ covariance2 @ root1)
    trace_root = np.sqrt(np.maximum(product, 0)).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(covariance1) + np.trace(covariance2) - 2 * trace_root)
