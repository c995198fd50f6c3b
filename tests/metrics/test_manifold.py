"""Neighbours, precision, recall, density and coverage against loops, and their errors against repetitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.metrics import manifold, neighbours

seeds = st.integers(0, 2**32 - 1)


def radii_by_loop(points, k):
    return [sorted(np.linalg.norm(p - q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]


def manifold_by_loop(samples, reference, k):
    of_samples, of_reference = radii_by_loop(samples, k), radii_by_loop(reference, k)
    apart = [[np.linalg.norm(s - r) for r in reference] for s in samples]
    pairs = [(i, j) for i in range(len(samples)) for j in range(len(reference))]
    in_reference_ball = [(i, j) for i, j in pairs if apart[i][j] <= of_reference[j]]
    in_sample_ball = [(i, j) for i, j in pairs if apart[i][j] <= of_samples[i]]
    return {
        'precision': len({i for i, _ in in_reference_ball}) / len(samples),
        'recall': len({j for _, j in in_sample_ball}) / len(reference),
        'density': len(in_reference_ball) / len(samples) / k,
        'coverage': len({j for _, j in in_reference_ball}) / len(reference),
    }


@given(seeds)
@settings(max_examples=15)
def test_the_values_and_jackknife_errors_are_those_of_loops(seed):
    rng = np.random.default_rng(seed)
    samples, reference = rng.normal(size=(12, 2)), rng.normal(size=(14, 2)) + 0.5
    found = manifold.manifold(samples, reference)
    for name, value in manifold_by_loop(samples, reference, 3).items():
        assert getattr(found, name).value == pytest.approx(value)
    left_out = [manifold_by_loop(np.delete(samples, i, axis=0), reference, 3) for i in range(12)]
    for name in ('recall', 'coverage'):
        values = np.array([one[name] for one in left_out])
        jackknife = np.sqrt(11 / 12 * np.sum((values - values.mean()) ** 2))
        assert getattr(found, name).standard_error == pytest.approx(jackknife, abs=1e-9)
        np.testing.assert_allclose(getattr(found, name).influences, 11 * (values.mean() - values), atol=1e-9)


def test_the_errors_cover_the_means_over_repetitions(monkeypatch):
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(100, 4))
    found = [manifold.manifold(rng.normal(size=(80, 4)) * 0.9 + 0.3, reference) for _ in range(200)]
    for name in manifold.Manifold._fields:
        values, errors = np.array([getattr(one, name)[:2] for one in found]).T
        covered = np.sum(np.abs(values - values.mean()) < 1.96 * errors)
        assert 180 <= covered <= 200, (name, covered)


def test_blocks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(0)
    samples, reference = rng.normal(size=(50, 3)), rng.normal(size=(61, 3))
    whole = manifold.manifold(samples, reference)
    monkeypatch.setattr(neighbours, 'BLOCK', 7)
    monkeypatch.setattr(manifold, 'ROWS', 7)
    for one, other in zip(manifold.manifold(samples, reference), whole, strict=True):
        np.testing.assert_allclose(one.value, other.value)
        np.testing.assert_allclose(one.influences, other.influences)


def test_equal_sets_lie_in_each_other_and_distant_ones_do_not():
    points = np.random.default_rng(0).normal(size=(40, 5))
    same = manifold.manifold(points, points)
    assert same.precision.value == same.recall.value == same.coverage.value == 1
    apart = manifold.manifold(points, points + 100)
    assert [estimate.value for estimate in apart] == [0, 0, 0, 0]


def test_too_few_vectors_are_refused():
    with pytest.raises(ValueError, match='at least 5 vectors'):
        manifold.manifold(np.zeros((4, 2)), np.zeros((9, 2)))


@given(seeds, st.integers(1, 4), st.booleans())
@settings(max_examples=15)
def test_the_nearest_are_those_of_all_distances(seed, k, same):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(30, 3)) + 1000  # far from 0, where float32 is coarse
    x = y if same else rng.normal(size=(9, 3)) + 1000
    everything = np.linalg.norm(x[:, None] - y[None], axis=2)
    if same:
        np.fill_diagonal(everything, np.inf)
    found = neighbours.nearest(x, y, k, same=same)
    np.testing.assert_allclose(found.distances, np.sort(everything, axis=1)[:, :k])
    np.testing.assert_array_equal(found.indices, np.argsort(everything, axis=1)[:, :k])


def test_a_copy_is_at_distance_0_among_bright_images():
    images = np.random.default_rng(0).integers(250, 256, (20, 3000), dtype=np.uint8)
    found = neighbours.nearest(images[[3, 7]], images, 1)
    assert found.distances.ravel().tolist() == [0, 0] and found.indices.ravel().tolist() == [3, 7]


def test_more_neighbours_than_vectors_are_refused():
    with pytest.raises(ValueError, match='3 neighbours are asked for, but there are 2'):
        neighbours.nearest(np.zeros((3, 1)), np.zeros((3, 1)), 3, same=True)
