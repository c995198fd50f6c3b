"""The Fréchet distance between Gaussians fitted to two sets of vectors.

FID is this distance for the features of one network, Inception. For raw pixels it is another number, useful for small
images, and not an FID.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy  # imports its parts when they are used
from jaxtyping import Float, Float64, Shaped

Moments = tuple[Float64[np.ndarray, 'D'], Float64[np.ndarray, 'D D']]  # mean and covariance
BLOCK = 4096  # vectors that are converted to float64 at a time
SEED = 2020  # for the random halves into which `extrapolate` splits the vectors
MIN_WAITING = 256  # vectors at least whose sums are computed at once


class Sums(NamedTuple):
    """The count, mean and scatter of a set of vectors; `merge` combines those of two sets.

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
    """Compute the count, mean and scatter of one batch in float64.

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
    """Return the sums of the union of two sets of vectors.

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


class Accumulator:
    """The mean and the covariance of a stream of vectors in float64.

    Vectors wait until there are as many as each has values. Merging takes several passes over (D, D) matrices, so that
    the sums of fewer vectors would take longer to merge than to compute. Memory holds these vectors and a few (D, D)
    matrices, whatever the number of all vectors. The result does not depend on how the stream is cut into batches.
    """

    def __init__(self) -> None:
        self._sums = NOTHING
        self._waiting = np.empty((0, 0))  # (max(D, MIN_WAITING), D) once D is known
        self._count = 0

    def add(self, batch: Shaped[np.ndarray, 'n ...']) -> None:
        """Add vectors.

        Args:
            batch: (n, …) of any real type, flattened to (n, D); n may be 0.

        Raises:
            ValueError: earlier vectors have another size.
        """
        if not len(batch):
            return
        vectors = np.asarray(batch).reshape(len(batch), -1)
        size = vectors.shape[1]
        if not len(self._waiting):
            self._waiting = np.empty((max(size, MIN_WAITING), size))
        if size != self._waiting.shape[1]:
            raise ValueError(f'vectors of {self._waiting.shape[1]} and of {size} values have no common covariance')
        while len(vectors):
            room = len(self._waiting) - self._count
            part, vectors = vectors[:room], vectors[room:]
            self._waiting[self._count : self._count + len(part)] = part
            self._count += len(part)
            if self._count == len(self._waiting):
                self._merge()

    def moments(self) -> Moments:
        """Return the mean (D,) and the covariance (D, D) of all vectors, with divisor N − 1.

        Raises:
            ValueError: there are fewer than two vectors.
        """
        if self._count:
            self._merge()
        return self._sums.moments()

    def _merge(self):
        self._sums = merge(self._sums, sums(self._waiting[: self._count]))
        self._count = 0


def moments(batches: Iterable[Shaped[np.ndarray, 'n ...']]) -> Moments:
    """Compute the mean and the covariance of a stream of vectors in float64, see `Accumulator`.

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
    accumulator = Accumulator()
    for batch in batches:
        accumulator.add(batch)
    return accumulator.moments()


def distance(moments1: Moments, moments2: Moments) -> float:
    """Compute the squared 2-Wasserstein distance between two Gaussians.

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½)    (Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500, Eq. 6)

    The trace of the root equals that of (LᵀΣ₂L)^½ for any L with LLᵀ = Σ₁. This matrix is symmetric, and L has as many
    columns as Σ₁ has rank, so singular covariances (constant pixels, fewer vectors than dimensions) need no special
    treatment.

    Args:
        moments1: mean (D,) and covariance (D, D).
        moments2: the same.

    Returns:
        The squared distance, in squared units of the vectors.
    """
    (mean1, covariance1), (mean2, covariance2) = moments1, moments2
    factors = (_factor(covariance1), covariance2), (_factor(covariance2), covariance1)
    factor, other = min(factors, key=lambda pair: pair[0].shape[1])  # the fewest eigenvalues that are rounding errors
    product = scipy.linalg.eigvalsh(factor.T @ other @ factor)
    trace_root = np.sqrt(np.maximum(product, 0)).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(covariance1) + np.trace(covariance2) - 2 * trace_root)


def influence(vectors: Float[np.ndarray, 'N D'], moments1: Moments, moments2: Moments) -> Float64[np.ndarray, 'N']:
    """Compute the influence of each vector on the distance between their Gaussian and another one.

    ψ(x) = 2(μ₁ − μ₂)ᵀ(x − μ₁) + (x − μ₁)ᵀ(I − T)(x − μ₁) − tr((I − T)Σ₁),   T = Σ₂^½ (Σ₂^½ Σ₁ Σ₂^½)^−½ Σ₂^½

    is the derivative of `distance` by the weight of x: T is the matrix of the optimal transport between the Gaussians,
    and I − T the derivative by Σ₁. The mean of ψ is 0, and std(ψ)/√N is the standard error of the distance (the
    infinitesimal jackknife: Jaeckel 1972; Efron 1982) if the other Gaussian is fixed.

    Args:
        vectors: (N, D).
        moments1: their mean (D,) and covariance (D, D).
        moments2: those of the other Gaussian.

    Returns:
        ψ of each vector, (N,), in squared units of the vectors.
    """
    (mean1, covariance1), (mean2, covariance2) = moments1, moments2
    factor2 = _factor(covariance2)  # in the place of Σ₂^½: T is the same for any L with LLᵀ = Σ₂
    values, basis = scipy.linalg.eigh(factor2.T @ covariance1 @ factor2, driver='evd')
    # The inverse root exists only in the directions in which both Gaussians have variance.
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    factor = factor2 @ basis[:, kept] * values[kept] ** -0.25
    result = np.empty(len(vectors))
    for start in range(0, len(vectors), BLOCK):
        centered = np.asarray(vectors[start : start + BLOCK], np.float64) - mean1
        linear = 2 * centered @ (mean1 - mean2)
        quadratic = np.sum(centered**2, axis=1) - np.sum((centered @ factor) ** 2, axis=1)
        result[start : start + BLOCK] = linear + quadratic
    return result - result.mean()


def standard_error(influences: Float64[np.ndarray, 'N']) -> float:
    """Return the standard error of a statistic of N independent vectors from their influences: std/√N."""
    return float(np.std(influences, ddof=1) / np.sqrt(len(influences)))


class Extrapolated(NamedTuple):
    """A distance without the bias due to the finite number of vectors.

    Attributes:
        value: the distance.
        standard_error: of the value.
        influences: (N,), of each vector on the value.
    """

    value: float
    standard_error: float
    influences: Float64[np.ndarray, 'N']


def extrapolate(
    vectors: Float[np.ndarray, 'N D'],
    moments1: Moments,
    moments2: Moments,
    distance12: float,
    influences: Float64[np.ndarray, 'N'],
) -> Extrapolated:
    """Extrapolate the distance to infinitely many vectors, linearly in 1/N (Chong & Forsyth 2020, arXiv:1911.07023).

    The line goes through the distance at N and the mean distance of two random halves of the vectors: 2·d(N) − d(N/2)
    for even N. The halves are always the same. The other Gaussian is fixed. The standard error follows from the
    influences on the same combination of distances.

    Args:
        vectors: (N, D), in any order, such as by class.
        moments1: their mean and covariance.
        moments2: those of the other Gaussian.
        distance12: the distance at N.
        influences: (N,), of the vectors on `distance12`.

    Returns:
        The limit, its standard error, and the influences.

    Raises:
        ValueError: there are too few vectors: half of them must exceed D by 2, or the distance is not linear in 1/N.
    """
    count, dimension = np.shape(vectors)
    if count < 2 * (dimension + 2):
        raise ValueError(f'{count} vectors are too few: their {dimension} dimensions need {2 * (dimension + 2)}')
    order = np.random.RandomState(SEED).permutation(count)
    halves = [order[::2], order[1::2]]
    distances, deviations, reciprocals = [], np.empty(count), []
    for half in halves:
        part = vectors[half]
        of_part = moments([part])
        distances.append(distance(of_part, moments2))
        deviations[half] = influence(part, of_part, moments2) * count / (2 * len(part))
        reciprocals.append(1 / len(part))
    step = np.mean(reciprocals) - 1 / count
    slope = (np.mean(distances) - distance12) / step
    combined = influences - (deviations - influences) / (step * count)
    return Extrapolated(float(distance12 - slope / count), standard_error(combined), combined)


def _factor(covariance: Float[np.ndarray, 'D D']) -> Float64[np.ndarray, 'D rank']:
    """L with LLᵀ = Σ, by Cholesky's method with pivots, which takes a twentieth of the time of a symmetric root."""
    covariance = np.asarray_chkfinite(covariance, np.float64)
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance, lower=1)
    result = np.zeros((len(lower), max(rank, 1)))  # LAPACK takes no empty matrices
    result[pivots - 1, :rank] = np.tril(lower)[:, :rank]
    return result
