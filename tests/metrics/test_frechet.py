"""The Fréchet distance where a closed form is known, and where scipy's matrix root is accurate."""

import tracemalloc

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from diffusion import data
from diffusion.metrics import frechet

seeds = st.integers(0, 2**32 - 1)
dimensions = st.integers(1, 8)


def rotation(rng, d):
    """Return a random orthogonal matrix."""
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def gaussian(rng, d, rank=None):
    """Return a random mean and covariance, which is singular if rank < d."""
    factor = rng.normal(size=(d, d if rank is None else rank))
    return rng.normal(size=d), factor @ factor.T


@given(seeds, dimensions)
def test_commuting_covariances_have_a_closed_form(seed, d):
    """In their common basis the distance is |μ₁ − μ₂|² + Σ(σ₁ − σ₂)²; some variances are 0."""
    rng = np.random.default_rng(seed)
    basis, means = rotation(rng, d), rng.normal(size=(2, d))
    stds = rng.uniform(0, 2, size=(2, d)) * (rng.uniform(size=(2, d)) > 0.2)
    ours = frechet.distance(*((mean, (basis * std**2) @ basis.T) for mean, std in zip(means, stds, strict=True)))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((stds[0] - stds[1]) ** 2)
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(seeds, dimensions)
def test_translating_one_gaussian_adds_the_squared_shift(seed, d):
    rng = np.random.default_rng(seed)
    (mean, covariance), other, shift = gaussian(rng, d), gaussian(rng, d), rng.normal(size=d)
    assert frechet.distance((mean, covariance), (mean + shift, covariance)) == pytest.approx(shift @ shift, abs=1e-6)
    together = frechet.distance((mean + shift, covariance), (other[0] + shift, other[1]))
    assert together == pytest.approx(frechet.distance((mean, covariance), other), rel=1e-6, abs=1e-6)


@given(seeds, dimensions)
def test_rotating_both_gaussians_changes_nothing(seed, d):
    rng = np.random.default_rng(seed)
    pair, basis = (gaussian(rng, d), gaussian(rng, d)), rotation(rng, d)
    rotated = ((basis @ mean, basis @ covariance @ basis.T) for mean, covariance in pair)
    assert frechet.distance(*rotated) == pytest.approx(frechet.distance(*pair), rel=1e-6, abs=1e-6)


@given(seeds, st.integers(2, 8))
def test_equals_the_formula_with_scipys_matrix_root(seed, d):
    """tr (Σ₁Σ₂)^½ by scipy; the covariances are regular and do not commute."""
    rng = np.random.default_rng(seed)
    (mean1, cov1), (mean2, cov2) = ((mean, cov + np.eye(d)) for mean, cov in (gaussian(rng, d), gaussian(rng, d)))
    trace = np.trace(scipy.linalg.sqrtm(cov1 @ cov2)).real
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2) - 2 * trace
    assert frechet.distance((mean1, cov1), (mean2, cov2)) == pytest.approx(expected, rel=1e-7, abs=1e-7)


@given(seeds, dimensions, st.data())
def test_is_the_square_of_a_metric(seed, d, draw):
    """Non-negative, 0 between equals, symmetric, and with the triangle inequality, up to rounding and for any rank."""
    rng = np.random.default_rng(seed)
    a, b, c = (gaussian(rng, d, draw.draw(st.integers(0, d))) for _ in range(3))
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-6)
    squares = ab, bc, ac = [frechet.distance(*pair) for pair in ((a, b), (b, c), (a, c))]
    assert all(np.isfinite(square) and square > -1e-6 for square in squares)
    assert frechet.distance(b, a) == pytest.approx(ab, rel=1e-5, abs=1e-5)
    assert np.sqrt(max(ac, 0)) <= np.sqrt(max(ab, 0)) + np.sqrt(max(bc, 0)) + 1e-3


def test_the_distance_from_a_point_is_the_mean_squared_distance():
    rng = np.random.default_rng(0)
    mean, covariance = gaussian(rng, 6)
    point = (np.zeros(6), np.zeros((6, 6)))
    for pair in ((point, (mean, covariance)), ((mean, covariance), point)):
        assert frechet.distance(*pair) == pytest.approx(mean @ mean + np.trace(covariance))


def test_moments_flatten_the_vectors_and_are_float64():
    images = np.array([[[1, 5]], [[3, 5]], [[8, 5]]], np.uint8)  # one pixel varies, one is constant
    mean, covariance = frechet.moments([images])
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, [4, 5])
    np.testing.assert_allclose(covariance, [[(9 + 1 + 16) / 2, 0], [0, 0]])
    mean, covariance = frechet.moments([np.array([0.0, 2.0])])
    assert mean.shape == (1,) and covariance.shape == (1, 1) and covariance[0, 0] == pytest.approx(2)


def test_moments_of_float32_vectors_keep_their_digits():
    vectors = (10_000 + np.random.default_rng(0).choice([-0.5, 0.5], size=(4000, 1))).astype(np.float32)
    assert frechet.moments([vectors])[1][0, 0] == pytest.approx(0.25, rel=1e-2)


def test_one_vector_is_an_error():
    with pytest.raises(ValueError, match='at least 2 vectors, but there are 1'):
        frechet.moments([np.zeros((1, 4))])


@given(seeds, dimensions, st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_moments_do_not_depend_on_how_the_vectors_are_split(seed, d, sizes):
    """numpy's mean and covariance of all vectors at once, far from 0, where sums of squares would lose their digits."""
    rng = np.random.default_rng(seed)
    batches = [1e4 + rng.normal(size=(n, d)) for n in sizes]
    vectors = np.concatenate([*batches, batch := 1e4 + 3 * rng.normal(size=(2, d))])
    mean, covariance = frechet.moments(iter([*batches, batch]))
    np.testing.assert_allclose(mean, vectors.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.atleast_2d(np.cov(vectors, rowvar=False)), rtol=1e-9, atol=1e-9)
    for ours, at_once in zip((mean, covariance), frechet.moments([vectors]), strict=True):
        np.testing.assert_array_equal(ours, at_once)


def test_a_batch_may_be_overwritten_by_the_next():
    batch, vectors = np.empty((3, 2)), np.random.default_rng(0).normal(size=(9, 2))

    def batches():
        for start in (0, 3, 6):
            batch[:] = vectors[start : start + 3]
            yield batch

    np.testing.assert_array_equal(frechet.moments(batches())[1], frechet.moments([vectors])[1])


def test_sums_of_parts_merge_in_any_order():
    """Hosts that each saw a part of the vectors put their sums together."""
    parts = [np.random.default_rng(i).normal(size=(i + 2, 3)) for i in range(3)]
    first, second, third = map(frechet.sums, parts)
    merged = frechet.merge(frechet.merge(third, first), second)
    for ours, expected in zip(merged.moments(), frechet.moments([np.concatenate(parts)]), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_memory_does_not_grow_with_the_number_of_vectors():
    """40,000 vectors of 32 values are 10 MB in float64; the covariance is 8 kB, a batch 51 kB."""
    batches = (np.full((200, 32), i % 2, np.float32) for i in range(200))
    tracemalloc.start()
    try:
        mean, covariance = frechet.moments(batches)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(mean, 0.5)
    np.testing.assert_allclose(covariance, 0.25 * 40_000 / 39_999)
    assert peak < 500_000


def test_what_is_no_stream_of_equal_vectors_is_an_error():
    with pytest.raises(TypeError, match=r'moments\(\[array\]\)'):
        frechet.moments(np.zeros((5, 4)))
    with pytest.raises(ValueError, match='vectors of 4 and of 1 values'):
        frechet.moments([np.zeros((5, 4)), np.zeros((5, 1))])
    with pytest.raises(ValueError, match='at least 2 vectors, but there are 0'):
        frechet.moments([])


@pytest.fixture(scope='module')
def digits():
    """The digits in [−1, 1], by their split."""
    return {
        split: data.to_float(data.load('digits', split, image_size=8, channels=1)[:]) for split in ('train', 'test')
    }


def test_constant_pixels_and_few_vectors_need_no_special_treatment(digits):
    """The corners of the digits are always black; 10 images span at most 9 of 64 dimensions."""
    images = digits['train']
    assert (images.reshape(len(images), -1).std(0) == 0).any()
    all_of_them, few, none = (frechet.moments([part]) for part in (images, images[:10], images[:2] * 0))
    assert frechet.distance(all_of_them, all_of_them) == pytest.approx(0, abs=1e-6)
    assert frechet.distance(few, few) == pytest.approx(0, abs=1e-5)
    distances = [frechet.distance(all_of_them, few), frechet.distance(few, all_of_them)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-5) and distances[0] > 1
    assert frechet.distance(few, none) == pytest.approx(few[0] @ few[0] + np.trace(few[1]))


def test_the_distance_between_random_halves_of_the_digits(digits):
    """0.34, as measured independently."""
    images = np.concatenate([digits['train'], digits['test']])
    order = np.random.default_rng(0).permutation(len(images))
    halves = (frechet.moments([images[half]]) for half in np.array_split(order, 2))
    assert frechet.distance(*halves) == pytest.approx(0.34, abs=0.05)


def draw(rng, count, mean, root):
    return rng.normal(size=(count, len(mean))) @ root + mean


def test_the_influence_is_the_derivative_by_the_weight_of_a_vector():
    """Compared with the distances after a vector's weight is raised and lowered; the other Gaussian is singular."""
    rng = np.random.default_rng(0)
    vectors, other = rng.normal(size=(20, 4)), gaussian(rng, 4, rank=3)
    own = frechet.moments([vectors])
    ours = frechet.influence(vectors, (own[0], own[1] * 19 / 20), other)

    def weighted(weights):
        weights = weights / weights.sum()
        mean = weights @ vectors
        return frechet.distance((mean, (vectors - mean).T * weights @ (vectors - mean)), other)

    step = 1e-4
    for i in (0, 7):
        up, down = (np.ones(20) + sign * step * 20 * (np.arange(20) == i) for sign in (1, -1))
        assert ours[i] == pytest.approx((weighted(up) - weighted(down)) / (2 * step), rel=1e-4, abs=1e-4)
    assert ours.mean() == pytest.approx(0, abs=1e-12)


def test_the_influence_on_the_distance_from_a_point_is_the_squared_distance_of_a_vector():
    vectors, point = np.random.default_rng(0).normal(size=(20, 3)), np.array([1.0, 2.0, 3.0])
    ours = frechet.influence(vectors, frechet.moments([vectors]), (point, np.zeros((3, 3))))
    squares = np.sum((vectors - point) ** 2, axis=1)
    np.testing.assert_allclose(ours, squares - squares.mean(), atol=1e-12)


def test_a_covariance_that_is_not_finite_is_an_error():
    covariance = np.diag([1.0, np.nan])
    for pair in ((covariance, np.eye(2)), (np.eye(2), covariance)):
        with pytest.raises(ValueError, match='infs or NaNs'):
            frechet.distance(*((np.zeros(2), each) for each in pair))


@pytest.mark.parametrize(('count', 'dimension', 'covered'), [(400, 8, (180, 198)), (30, 40, (180, 200))])
def test_the_standard_error_covers_the_mean_over_repetitions(count, dimension, covered):
    """In about 190 of 200; with fewer vectors than dimensions the error is too large rather than too small."""
    rng = np.random.default_rng(1)
    other, root = (np.zeros(dimension), np.eye(dimension)), rng.normal(size=(dimension, dimension)) / dimension**0.5
    values, errors = [], []
    for _ in range(200):
        vectors = draw(rng, count, np.full(dimension, 0.2), root)
        own = frechet.moments([vectors])
        values.append(frechet.distance(own, other))
        errors.append(frechet.standard_error(frechet.influence(vectors, own, other)))
    inside = np.abs(np.array(values) - np.mean(values)) < 1.96 * np.array(errors)
    assert covered[0] <= inside.sum() <= covered[1]


def test_the_extrapolated_distance_has_no_bias_and_an_honest_error():
    """The distance of 160 vectors in 12 dimensions is far too large; its limit covers the closed form."""
    rng = np.random.default_rng(2)
    other, stds = (np.zeros(12), np.eye(12)), np.linspace(0.5, 1.5, 12)
    true = 12 * 0.1**2 + np.sum((stds - 1) ** 2)
    values, limits = [], []
    for _ in range(200):
        vectors = draw(rng, 160, np.full(12, 0.1), np.diag(stds))
        own = frechet.moments([vectors])
        influences = frechet.influence(vectors, own, other)
        values.append(frechet.distance(own, other))
        limits.append(frechet.extrapolate(vectors, own, other, values[-1], influences))
    assert np.mean(values) > true + 0.15
    assert np.mean([limit.value for limit in limits]) == pytest.approx(true, abs=0.04)
    assert 178 <= sum(abs(limit.value - true) < 1.96 * limit.standard_error for limit in limits) <= 199


def test_the_extrapolated_distance_does_not_take_classes_in_turn_for_halves():
    """As those of conditional samples, image i of class i mod 2: real ones have a distance around 0."""
    rng, centers = np.random.default_rng(0), np.array([[2.0, 0.0], [-2.0, 0.0]])
    other = np.zeros(2), np.diag([5.0, 1.0])
    found = []
    for _ in range(50):
        vectors = rng.normal(size=(400, 2)) + centers[np.arange(400) % 2]
        own = frechet.moments([vectors])
        influences = frechet.influence(vectors, own, other)
        found.append(frechet.extrapolate(vectors, own, other, frechet.distance(own, other), influences).value)
    assert np.mean(found) == pytest.approx(0, abs=0.06)  # by halves of one class each it would be −5


def test_the_error_of_the_extrapolated_distance_from_a_point_is_that_of_its_combination():
    """2·d(N) − d(N/2) from a point, where the influence is the squared distance less the mean: of all, of a half."""
    vectors, point = np.random.default_rng(0).normal(size=(12, 3)), (np.array([1.0, 2.0, 3.0]), np.zeros((3, 3)))
    own = frechet.moments([vectors])
    influences = frechet.influence(vectors, own, point)
    ours = frechet.extrapolate(vectors, own, point, frechet.distance(own, point), influences)
    order = np.random.RandomState(frechet.SEED).permutation(12)
    squares = np.sum((vectors - point[0]) ** 2, axis=1)[order].reshape(6, 2)  # a column for each half
    combined = 2 * (squares - squares.mean()) - (squares - squares.mean(axis=0))
    assert ours.standard_error == pytest.approx(combined.std(ddof=1) / np.sqrt(12))


def test_too_few_vectors_have_no_extrapolation():
    vectors = np.random.default_rng(0).normal(size=(19, 8))
    own = frechet.moments([vectors])
    with pytest.raises(ValueError, match='19 vectors are too few: their 8 dimensions need 20'):
        frechet.extrapolate(vectors, own, own, 0.0, np.zeros(19))
