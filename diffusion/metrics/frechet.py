"""The Fréchet distance between the Gaussians fitted to two sets of vectors.

FID is this distance between features of a certain network. Between raw pixels it is a number of its
own, good for small images, and no FID.
"""

import numpy as np
import scipy.linalg


def moments(vectors):
    """Mean (D,) and covariance (D, D), with the divisor N−1, of vectors (N, ...) flattened to (N, D), in float64."""
    vectors = np.asarray(vectors, np.float64).reshape(len(vectors), -1)
    if len(vectors) < 2:
        raise ValueError(f'a covariance needs at least 2 vectors, not {len(vectors)}')
    return vectors.mean(0), np.atleast_2d(np.cov(vectors, rowvar=False))


def distance(moments1, moments2):
    """|μ1 − μ2|² + tr(Σ1 + Σ2 − 2·(Σ1 Σ2)^½), the squared 2-Wasserstein distance of two Gaussians.

    Dowson & Landau 1982; Heusel et al. 2017 (arXiv:1706.08500) Eq. 6. The trace of the root is that of
    (Σ1^½ Σ2 Σ1^½)^½, which is symmetric, so that singular covariances (pixels that never change, fewer
    vectors than dimensions) do no harm.
    """
    (mean1, covariance1), (mean2, covariance2) = moments1, moments2
    values, vectors = scipy.linalg.eigh(covariance1)
    root1 = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = scipy.linalg.eigvalsh(root1 @ covariance2 @ root1)
    trace_root = np.sqrt(np.maximum(product, 0)).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(covariance1) + np.trace(covariance2) - 2 * trace_root)
