"""The Fréchet distance between the Gaussians that are fitted to two sets of vectors.

FID is this distance between the features of a certain network. Between raw pixels it is another number, useful for
small images, and not an FID.
"""

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float64, Shaped

Moments = tuple[Float[np.ndarray, 'D'], Float[np.ndarray, 'D D']]  # mean and covariance


def moments(vectors: Shaped[np.ndarray, 'N ...']) -> tuple[Float64[np.ndarray, 'D'], Float64[np.ndarray, 'D D']]:
    """Compute the mean and the covariance of vectors in float64.

    Args:
        vectors: (N, …) of any real type, flattened to (N, D).

    Returns:
        The mean (D,), and the covariance (D, D) with divisor N − 1.

    Raises:
        ValueError: there are fewer than two vectors.
    """
    vectors = np.asarray(vectors, np.float64).reshape(len(vectors), -1)
    if len(vectors) < 2:
        raise ValueError(f'a covariance needs at least 2 vectors, but there are {len(vectors)}')
    return vectors.mean(0), np.atleast_2d(np.cov(vectors, rowvar=False))


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
