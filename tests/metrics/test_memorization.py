"""Planted copies are found, and independent images raise no alarm."""

import numpy as np
import pytest

from diffusion import data
from diffusion.metrics import memorization


@pytest.fixture(scope='module')
def digits():
    """All digits, flattened, as real numbers."""
    splits = [data.load('digits', split, image_size=8, channels=1)[:] for split in ('train', 'test')]
    return np.concatenate(splits).reshape(-1, 64).astype(np.float64)


def parts(digits, seed):
    """Samples, training images and held-out images, drawn anew."""
    order = np.random.default_rng(seed).permutation(len(digits))
    return digits[order[:150]], digits[order[150:850]], digits[order[850:1250]]


@pytest.mark.slow
def test_independent_images_raise_an_alarm_in_at_most_5_of_100_draws(digits):
    alarms = sum(bool(memorization.report(*parts(digits, seed)).copies) for seed in range(100))
    assert alarms <= 5


@pytest.mark.parametrize('noise', [0, 4, 8])
def test_planted_copies_are_found(digits, noise):
    """Exact ones, and ones with a noise of 3 % of the range of the pixels."""
    samples, training, held_out = parts(digits, 0)
    rng = np.random.default_rng(0)
    places, originals = rng.choice(150, 5, replace=False), rng.choice(700, 5, replace=False)
    samples = samples.copy()
    samples[places] = training[originals] + noise * rng.normal(size=(5, 64))
    found = memorization.report(samples, training, held_out)
    assert sorted(found.copies) == sorted(places)
    np.testing.assert_array_equal(found.indices[places], originals)
    assert (np.argsort(found.distances)[:5].tolist() == found.copies) or noise == 0


def test_the_probabilities_are_uniform_below_the_edge():
    """For distances of a power law, the p-value of a new image is below α with probability α, or less far below."""
    rng = np.random.default_rng(0)
    below = []
    for _ in range(400):
        null, new = np.sort(rng.uniform(size=200) ** (1 / 7)), rng.uniform(size=100) ** (1 / 7)
        p = memorization.tail_probabilities(new, null)
        below.append([np.mean(p <= alpha) for alpha in (0.2, 0.05, 0.01)])
    np.testing.assert_allclose(np.mean(below, axis=0), [0.2, 0.05, 0.01], rtol=0.2)


def test_a_probability_by_hand():
    """Of 9 held-out images 3 are below the edge, the fourth; below the least of them, their tail counts."""
    null, distances = np.arange(1.0, 10.0), np.array([3.999999, 2.0, 0.5, 0.0])
    mean = np.log(4 / np.array([1, 2, 3])).mean()
    expected = [0.4, 0.3, 0.4 * (1 + np.log(8) / (3 * mean)) ** -3, 0]
    np.testing.assert_allclose(memorization.tail_probabilities(distances, null), expected, rtol=1e-6)


@pytest.mark.parametrize('fraction', [0, 0.005, 0.02])
def test_near_duplicates_in_the_data_raise_no_alarm(fraction):
    """The tail is far heavier than that of the other images; at most 5 % of independent sets should have an alarm."""
    rng = np.random.default_rng(0)

    def draw(count):
        distances = rng.uniform(size=count) ** (1 / 20)
        return np.where(rng.uniform(size=count) < fraction, 0.05 * rng.uniform(0.5, 1.5, count), distances)

    alarms = sum(
        500 * memorization.tail_probabilities(draw(500), np.sort(draw(1000))).min() <= 0.05 for _ in range(200)
    )
    assert alarms <= 10
    assert memorization.tail_probabilities(np.array([0.0]), np.sort(draw(1000)))[0] == 0  # a copy is one nevertheless


def test_one_copy_among_the_held_out_images_leaves_the_rest_of_the_tail():
    null = np.sort(np.random.default_rng(0).uniform(size=1000) ** (1 / 20))
    null[0] = 0
    found = memorization.tail_probabilities(np.array([0.0, 0.3, 0.9]), null)
    assert found[0] == found[1] == 2 / 1001 and found[2] > 0.1


def test_equal_distances_have_no_tail():
    """A new image is below all nine with probability 1/10, not 0; held-out copies at distance 0 warn of nothing."""
    found = memorization.tail_probabilities(np.array([0.5, 1.0, 2.0]), np.ones(9))
    np.testing.assert_allclose(found, [0.1, 1, 1])
    with np.errstate(all='raise', divide='ignore'):
        found = memorization.tail_probabilities(np.array([0.0, 0.5]), np.array([0.0, *np.arange(1.0, 9.0)]))
    np.testing.assert_allclose(found, 0.2)


def test_without_held_out_images_nothing_is_called_a_copy(digits):
    _, training, _ = parts(digits, 0)
    found = memorization.report(training[:3], training, None)
    assert found.copies == [] and found.p_values is None and found.medians == (0, None)


def test_copies_among_the_held_out_images_make_copies_unremarkable(digits):
    _, training, _ = parts(digits, 0)
    assert memorization.report(training[:3], training, training[:50]).copies == []
