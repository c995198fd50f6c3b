"""The kernel distance (KID, if the vectors are Inception's): an unbiased estimate of the squared MMD."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020  # torch-fidelity's, whose random generator draws the subsets
OTHERS = 5000  # vectors with which each sample is compared for its influence
BLOCK = 1000  # samples whose influences are computed at once


class Kernel(NamedTuple):
    """The kernel distance.

    Attributes:
        value: the mean over the subsets. It may be slightly negative, because the estimate is unbiased.
        standard_error: of the value, over new samples; the reference is fixed.
        spread: the standard deviation over the subsets, which torch-fidelity prints. It is not the error of the value.
        subset_size: vectors in a subset.
        subset_values: (subsets,), whose mean is the value.
        influences: (N,), of each sample on the estimate from all vectors.
    """

    value: float
    standard_error: float
    spread: float
    subset_size: int
    subset_values: Float64[np.ndarray, 'subsets']
    influences: Float64[np.ndarray, 'N']


def kernel(x: Float[np.ndarray, 'N D'], y: Float[np.ndarray, 'M D']) -> Float64[np.ndarray, 'N M']:
    """Compute k(x, y) = (xᵀy/D + 1)³ (Bińkowski et al. 2018, arXiv:1801.01401, §4)."""
    base = np.asarray(x, np.float64) @ np.asarray(y, np.float64).T / x.shape[1] + 1
    return base * base * base  # far faster than base ** 3


def kernel_distance(
    samples: Float[np.ndarray, 'N D'],
    reference: Float[np.ndarray, 'M D'],
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> Kernel:
    """Estimate the squared MMD with the kernel (xᵀy/D + 1)³ as the mean over random subsets of equal size.

    mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2·mean_{i,j} k(x_i, y_j)      (Bińkowski et al. 2018, Eq. 4)

    Subsets are drawn without replacement, as torch-fidelity draws them. The variance of the value has two parts: that
    of the samples, from the Hoeffding decomposition of the U-statistic (Serfling 1980, §5.2), whose terms are
    estimated within the subsets; and that of drawing the subsets, spread²/subsets.

    Args:
        samples: (N, D).
        reference: (M, D).
        subsets: their number.
        subset_size: vectors in each; at most N and M of them are taken.
        seed: of the subsets.

    Returns:
        The estimate.

    Raises:
        ValueError: there are fewer than two vectors.
    """
    size = min(subset_size, len(samples), len(reference))
    if size < 2:
        raise ValueError(f'a kernel distance needs at least 2 vectors, but there are {size}')
    rng = np.random.RandomState(seed)
    values, variances = [], []
    for _ in range(subsets):
        x = samples[rng.choice(len(samples), size, replace=False)]
        y = reference[rng.choice(len(reference), size, replace=False)]
        xx, xy, yy = kernel(x, x), kernel(x, y), kernel(y, y)
        values.append(_off_diagonal_mean(xx) + _off_diagonal_mean(yy) - 2 * xy.mean())
        variances.append(_variance(xx, xy, len(samples), len(reference)))
        if size == len(samples) == len(reference):  # every subset is all of them
            break
    spread = float(np.std(values))
    error = float(np.sqrt(np.mean(variances) + spread**2 / len(values)))
    influences = influence(samples, reference, seed=seed)
    return Kernel(float(np.mean(values)), error, spread, size, np.array(values), influences)


def influence(
    samples: Float[np.ndarray, 'N D'],
    reference: Float[np.ndarray, 'M D'],
    *,
    others: int = OTHERS,
    seed: int = SEED,
) -> Float64[np.ndarray, 'N']:
    """Return the influence of each sample on the kernel distance: 2·h(x_i) minus its mean over the samples.

    h(x_i) = mean_{j≠i} k(x_i, x_j) − mean_j k(x_i, y_j)      (Serfling 1980, §5.2)

    The variance of the influences, divided by N, slightly overestimates the variance of the distance over new samples,
    because the means over j are of finitely many vectors.

    Args:
        samples: (N, D), at least two.
        reference: (M, D).
        others: at most so many x_j, and as many y_j, are drawn at random; the same ones whenever N and M are the same.
        seed: of this draw.
    """
    rng = np.random.RandomState(seed)
    xs, ys = (rng.choice(n, min(others, n), replace=False) for n in (len(samples), len(reference)))
    other_samples, other_references = samples[xs], reference[ys]
    result = np.empty(len(samples))
    for start in range(0, len(samples), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(samples)))
        xx = kernel(samples[rows], other_samples)
        itself = rows[:, None] == xs
        of_samples = np.where(itself, 0, xx).sum(axis=1) / (len(xs) - itself.sum(axis=1))
        result[rows] = of_samples - kernel(samples[rows], other_references).mean(axis=1)
    return 2 * (result - result.mean())


def _off_diagonal_mean(matrix):
    size = len(matrix)
    return (matrix.sum() - np.trace(matrix)) / (size * (size - 1))


def _variance(
    xx: Float64[np.ndarray, 'n n'], xy: Float64[np.ndarray, 'n m'], num_samples: int, num_reference: int
) -> float:
    """Estimate the variance of the statistic over new samples from the kernels of a subset of them.

    The variance is 4ζ/N + 2ρ/(N·(N − 1)). ζ is the variance of h(x) = mean_j k(x, x_j) − mean_j k(x, y_j), over all
    other samples and the reference; ρ is that of k(x_i, x_j) without the part that row and column means explain.
    """
    size, others = xy.shape
    pairs = size - 1
    off = xx - np.diag(np.diag(xx))
    row = off.sum(axis=1) / pairs
    # The row means of a subset differ from those of all by noise.
    noise_xx = np.mean(np.sum(off**2, axis=1) - pairs * row**2) / max(pairs - 1, 1) / pairs
    noise_xy = np.mean(xy.var(axis=1, ddof=1)) * (1 / others - 1 / num_reference)
    zeta = np.var(row - xy.mean(axis=1), ddof=1) - noise_xx - noise_xy
    total = _off_diagonal_mean(xx**2) - _off_diagonal_mean(xx) ** 2
    rho = total - 2 * max(np.var(row, ddof=1) - noise_xx, 0)
    return 4 * max(zeta, 0) / num_samples + 2 * max(rho, 0) / (num_samples * (num_samples - 1))
