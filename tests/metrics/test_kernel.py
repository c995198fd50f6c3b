"""The kernel distance against its closed form for Gaussians, and the coverage of its error."""

import numpy as np
import pytest

from diffusion.metrics.kernel import kernel_distance


def expected_kernel(mean1, mean2, variance1, variance2):
    """E (xᵀy/d + 1)³ for x ~ N(m₁, v₁I) and y ~ N(m₂, v₂I): with s = xᵀy/d, E(1 + 3s + 3s² + s³) given x is known."""
    d = len(mean1)
    # s | x is Gaussian with mean a = xᵀm₂/d and variance b = v₂|x|²/d²; integrate over x by Gauss–Hermite in the plane
    # of m₁ and m₂ and exactly elsewhere: d = 1 here, so that one dimension is enough.
    assert d == 1
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    x = mean1[0] + np.sqrt(variance1) * nodes
    a, b = x * mean2[0], variance2 * x**2
    return weights @ (1 + 3 * a + 3 * (a**2 + b) + a**3 + 3 * a * b) / weights.sum()


def test_the_value_is_unbiased_and_its_error_covers_the_truth():
    """200 repetitions with a reference that is much larger than the samples."""
    rng = np.random.default_rng(0)
    mean, variance = np.array([0.4]), 0.3
    zero, one = np.array([0.0]), 0.5
    true = (
        expected_kernel(mean, mean, variance, variance)
        + expected_kernel(zero, zero, one, one)
        - 2 * expected_kernel(mean, zero, variance, one)
    )
    found = []
    for seed in range(200):
        samples, reference = rng.normal(mean, variance**0.5, (400, 1)), rng.normal(zero, one**0.5, (20_000, 1))
        found.append(kernel_distance(samples, reference, subsets=8, subset_size=200, seed=seed))
    values, errors = (np.array([getattr(one, name) for one in found]) for name in ('value', 'standard_error'))
    assert values.mean() == pytest.approx(true, abs=3 * values.std() / 14)
    assert 178 <= np.sum(np.abs(values - true) < 1.96 * errors) <= 199
    assert np.mean([one.spread for one in found]) > 1.2 * values.std()  # that of smaller samples


def test_the_same_distribution_has_a_distance_around_0():
    rng = np.random.default_rng(1)
    reference = rng.normal(size=(2000, 8))
    values = [kernel_distance(rng.normal(size=(200, 8)), reference, subsets=4).value for _ in range(30)]
    assert min(values) < 0 < max(values)


def test_the_error_is_that_of_the_samples_alone_where_the_whole_reference_is_taken():
    """The reference, of ten vectors, is fixed: its own noise is none of the value's over new samples."""
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(10, 16))
    found = [kernel_distance(rng.normal(size=(10, 16)), reference) for _ in range(300)]
    variance = np.mean([one.standard_error**2 for one in found])
    assert variance == pytest.approx(np.var([one.value for one in found]), rel=0.3)


def test_all_vectors_are_taken_where_there_are_too_few_for_a_subset():
    """The mean over pairs, by loops."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)) + 1

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    expected = (
        np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
        + np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
        - 2 * np.mean([k(a, b) for a in x for b in y])
    )
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(expected)
    assert found.subset_size == 5 and found.spread == 0 and found.standard_error > 0
    with pytest.raises(ValueError, match='at least 2 vectors, but there are 1'):
        kernel_distance(x[:1], y)
