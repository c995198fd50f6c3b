"""Probabilities of discrete pixel values, against mpmath with 40 digits and against their sum, 1."""

import functools

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from diffusion.likelihood.decoder import log_likelihood
from tests.likelihood_oracles import QUICK

SPREADS = (1e-4, 100.0)


def levels(bins):
    """The values of a pixel, (bins,) float32."""
    return (np.arange(bins) * (2 / (bins - 1)) - 1).astype(np.float32)


@functools.partial(jax.jit, static_argnames='bins')
def log_probabilities(x0, mean, std, bins=256):
    """log Pr of each x0 (N,), as N images of one pixel."""
    return log_likelihood(x0, jnp.broadcast_to(mean, x0.shape), std, bins=bins)


def all_levels(mean, std, bins=256):
    return np.asarray(log_probabilities(levels(bins), jnp.float32(mean), jnp.float32(std), bins), np.float64)


def exact(k, mean, std, bins=256):
    """log Pr(level k) by DDPM Eq. 13, from the float32 values of mean and std."""
    with mp.workdps(40):
        x, delta = 2 * mp.mpf(k) / (bins - 1) - 1, mp.mpf(1) / (bins - 1)
        mean, std = mp.mpf(float(np.float32(mean))), mp.mpf(float(np.float32(std)))
        low = -mp.inf if k == 0 else (x - delta - mean) / std
        high = mp.inf if k == bins - 1 else (x + delta - mean) / std
        if low > 0:  # both tails are small on this side
            low, high = -high, -low

        def below(z):  # mp.ncdf loses its digits in the far tail
            return mp.erfc(-z / mp.sqrt(2)) / 2

        return float(mp.log(below(high) - below(low)))


def tolerance(k, mean, std, bins=256):
    """How far rounding x_0 to float32 may move log Pr: 6e-8 over std, times the distance in stds."""
    x = 2 * k / (bins - 1) - 1
    return 1e-5 + 6e-8 / std * (abs(x - mean) / std + 1)


stds = st.floats(np.log(SPREADS[0]), np.log(SPREADS[1])).map(np.exp)
means = st.one_of(st.floats(-1, 1), st.floats(-5, 5), st.integers(0, 510).map(lambda i: i / 255 - 1))


@given(means, stds)
def test_the_levels_sum_to_one(mean, std):
    np.testing.assert_allclose(np.exp(all_levels(mean, std)).sum(), 1, atol=1e-6)


@pytest.mark.parametrize('std', [1e-4, 1e-3, 0.01, 0.1])
def test_neighbouring_bins_neither_overlap_nor_leave_a_gap(std):
    """If the mean is an edge, half the probability is on either side, so that a gap would cost the most."""
    means = np.concatenate([np.arange(1, 510, 2) / 255 - 1, np.linspace(-1.1, 1.1, 300)]).astype(np.float32)
    sums = [np.exp(all_levels(mean, std)).sum() for mean in means]
    np.testing.assert_allclose(sums, 1, atol=1e-6)


@pytest.mark.parametrize('bins', [2, 17, 65536])
@pytest.mark.parametrize('mean', [-1.5, -1.0, -0.123, 0.0, 1 / 17, 0.999, 3.0])
@pytest.mark.parametrize('std', [1e-4, 0.003, 0.03, 0.5, 2.0, 100.0])
def test_the_levels_sum_to_one_for_other_numbers_of_bins(bins, mean, std):
    np.testing.assert_allclose(np.exp(all_levels(mean, std, bins)).sum(), 1, atol=1e-6)


@given(st.integers(0, 255), means, stds)
def test_a_level_against_40_digits(k, mean, std):
    found = all_levels(mean, std)[k]
    expected = exact(k, mean, std)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=tolerance(k, mean, std))


@pytest.mark.parametrize('bins', [2, 17, 65536])
def test_a_level_against_40_digits_for_other_numbers_of_bins(bins):
    for k in sorted({0, 1, bins // 3, bins - 1}):
        for mean in (-1.2, -0.4, 0.7):
            for std in (0.01, 0.2, 5.0):
                found = log_probabilities(levels(bins)[[k]], jnp.float32(mean), jnp.float32(std), bins)[0]
                np.testing.assert_allclose(
                    found, exact(k, mean, std, bins), rtol=1e-5, atol=tolerance(k, mean, std, bins)
                )


def test_far_tails_keep_their_digits():
    """A black pixel where white was certain has −2·10⁸ nats, not −inf; an almost certain one keeps its last digits."""
    for k, mean, std in [(0, 1.0, 1e-4), (255, -1.0, 1e-4), (100, 1.0, 1e-4), (128, -1.0, 1e-3), (3, 50.0, 0.1)]:
        np.testing.assert_allclose(all_levels(mean, std)[k], exact(k, mean, std), rtol=1e-5)
    for k, mean, std in [(0, -1.0, 5e-4), (255, 1.1, 0.02), (0, -1.02, 0.004), (128, 1 / 255, 8e-4)]:
        np.testing.assert_allclose(all_levels(mean, std)[k], exact(k, mean, std), rtol=1e-3, atol=1e-7)


def test_only_the_outermost_bins_are_open():
    for std in (1e-4, 0.01, 1.0):
        for mean in (-9.0, 9.0):
            found = all_levels(mean, std)
            np.testing.assert_allclose(found[0 if mean < 0 else 255], 0, atol=1e-6)
            assert np.argmax(found) == (0 if mean < 0 else 255)
            assert np.all(np.diff(found)[1:-1] * mean >= 0)
    # By symmetry black under `mean` is white under −mean.
    np.testing.assert_array_equal(all_levels(0.3, 0.2), all_levels(-0.3, 0.2)[::-1])
    # The second level has its own bin, not an open one.
    np.testing.assert_allclose(all_levels(-0.99, 0.5)[1], exact(1, -0.99, 0.5), rtol=1e-5)
    assert all_levels(-0.99, 0.5)[0] > all_levels(-0.99, 0.5)[1] + 3


@jax.jit
def with_gradients(x0, mean, std):
    return jax.value_and_grad(lambda mean, std: log_likelihood(x0, mean, std).sum(), argnums=(0, 1))(mean, std)


extreme_means = st.one_of(means, st.floats(-1e3, 1e3), st.sampled_from([-1.0, 1.0, 0.0, -1e4, 1e4]))


@given(extreme_means, stds)
def test_no_nan_nor_infinity_in_values_and_gradients(mean, std):
    assert np.all(np.isfinite(all_levels(mean, std)))
    value, (by_mean, by_std) = with_gradients(levels(256), jnp.full(256, mean, jnp.float32), jnp.float32(std))
    assert np.isfinite(value) and np.all(np.isfinite(by_mean)) and np.isfinite(by_std)


@given(st.integers(0, 255), st.floats(-1, 1), st.floats(np.log(1e-2), 0).map(np.exp))
def test_gradients_equal_the_closed_form(k, mean, std):
    """d log Pr/d mean = (φ(low) − φ(high))/(std·Pr), with the open ends' φ at infinity 0."""
    mean, std = float(np.float32(mean)), float(np.float32(std))
    low, high = (-np.inf if k == 0 else k - 0.5), (np.inf if k == 255 else k + 0.5)
    with mp.workdps(40):
        low, high = ((2 * mp.mpf(edge) / 255 - 1 - mean) / std for edge in (low, high))
        flip = low > 0
        top, bottom = (-low, -high) if flip else (high, low)
        probability = mp.erfc(-top / mp.sqrt(2)) / 2 - mp.erfc(-bottom / mp.sqrt(2)) / 2
        expected = float((mp.npdf(low) - mp.npdf(high)) / (std * probability))
    _, (by_mean, _) = with_gradients(levels(256), jnp.full(256, mean, jnp.float32), jnp.float32(std))
    np.testing.assert_allclose(by_mean[k], expected, rtol=1e-3, atol=1e-3 / std)


def test_gaussian_decoder_is_a_density():
    rng = np.random.default_rng(0)
    x0, mean = rng.normal(size=(2, 5, 3, 3, 3)).astype(np.float32)
    std = np.exp(rng.normal(size=(5, 1, 1, 1))).astype(np.float32)
    expected = scipy.stats.norm.logpdf(x0.astype(float), mean, std)
    for width, logs in ((std, expected), (np.float32(0.7), scipy.stats.norm.logpdf(x0.astype(float), mean, 0.7))):
        found = log_likelihood(x0, mean, width, decoder='gaussian')
        np.testing.assert_allclose(found, logs.sum(axis=(1, 2, 3)), rtol=1e-5)


of_images = jax.jit(log_likelihood, compiler_options=QUICK)


@pytest.mark.parametrize('shape', [(4, 8, 8, 1), (4, 5, 7, 3), (4, 6), (4,)])
def test_an_image_is_the_sum_of_its_pixels(shape):
    """Grey, colour, vectors and scalars; a width for each image or one for all."""
    rng = np.random.default_rng(1)
    k = rng.integers(0, 256, shape)
    mean = rng.uniform(-1.5, 1.5, shape).astype(np.float32)
    for std in (np.exp(rng.uniform(-3, 1, (4,) + (1,) * (len(shape) - 1))).astype(np.float32), np.float32(0.3)):
        found = of_images(levels(256)[k], mean, std)
        assert found.shape == (4,) and found.dtype == jnp.float32
        # Repeated to one length, so that all shapes share a compiled program.
        pixels = (np.resize(array, 512) for array in (levels(256)[k], mean, np.broadcast_to(std, shape)))
        expected = np.asarray(log_probabilities(*pixels))[: k.size].reshape(4, -1).sum(axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_decoder_is_an_error_that_lists_the_table():
    with pytest.raises(ValueError, match=r"'logistic'.*discretized, gaussian"):
        log_likelihood(jnp.zeros(3), jnp.zeros(3), 1.0, decoder='logistic')
