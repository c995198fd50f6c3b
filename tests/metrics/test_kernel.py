"""The kernel distance against its closed form for Gaussians, and the coverage of its error."""

import numpy as np
import pytest

from diffusion.metrics import kernel
from diffusion.metrics.kernel import influence, kernel_distance
from diffusion.modes.compare import paired_error


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


def test_the_paired_error_covers_the_difference_of_sets_of_the_same_noise():
    """100 repetitions: of sets that differ little and of sets that differ much, with subsets and with all vectors."""
    rng = np.random.default_rng(5)
    for noise, subsets, size in ((0.02, 10, 60), (0.3, 10, 60), (0.1, 1, 200)):
        found, ratios, reference = [], [], rng.normal(size=(200, 4))
        for _ in range(100):
            first = rng.normal(0.2, 1, (200, 4))
            second = first + 0.1 + noise * rng.normal(size=first.shape)
            results = [kernel_distance(s, reference, subsets=subsets, subset_size=size) for s in (first, second)]
            arrays = [{'KID': one.influences, 'KID|subsets': one.subset_values} for one in results]
            error = paired_error(*arrays, 'KID')
            found.append((results[0].value - results[1].value, error))
            ratios.append(np.hypot(*(one.standard_error for one in results)) / error)
        differences, errors = np.array(found).T
        covered = np.sum(np.abs(differences - differences.mean()) < 1.96 * errors)
        assert 88 <= covered <= 99 and np.median(ratios) > 2  # times as large as if they were independent


def test_the_influence_is_that_of_loops(monkeypatch):
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(4, 3)) + 1

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    of_samples = [np.mean([k(x[i], x[j]) for j in range(7) if j != i]) for i in range(7)]
    h = np.array(of_samples) - [np.mean([k(a, b) for b in y]) for a in x]
    monkeypatch.setattr(kernel, 'BLOCK', 3)
    np.testing.assert_allclose(influence(x, y), 2 * (h - h.mean()))
    many = rng.normal(size=(4000, 3))
    few, more = (influence(many, many + 1, others=others) for others in (1000, 4000))
    assert np.corrcoef(few, more)[0, 1] > 0.99


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
