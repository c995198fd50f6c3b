"""The colours of samples against those of the data, by images whose means are known."""

import numpy as np
import pytest

from diffusion.metrics import colour

DATA = (100.0, 150.0, 200.0)


def images(count, shift=(0, 0, 0), spread=0):
    """Flat images whose channels have the data's means, shifted, ± spread alternately; all in levels of 0 … 255."""
    signs = np.where(np.arange(count) % 2, 1, -1)[:, None]
    means = np.asarray(DATA) + shift + spread * signs
    return np.broadcast_to(means[:, None, None], (count, 4, 4, 3)).astype(np.uint8)


def test_the_drift_is_the_difference_of_the_means_in_units_of_the_network():
    found, _ = colour.drift(images(10, shift=(5, 0, -20), spread=30), DATA)
    np.testing.assert_allclose(found, np.array([5, 0, -20]) / 127.5, atol=1e-12)


@pytest.mark.parametrize('channel', range(3))
@pytest.mark.parametrize(('levels', 'warned'), [(6, False), (7, True), (-6, False), (-7, True)])
def test_it_warns_of_what_is_seen_in_any_channel(channel, levels, warned):
    """0.05 of −1 … 1 are 6.4 levels; images that are all alike leave no doubt of their mean."""
    shift = np.zeros(3)
    shift[channel] = levels
    _, warning = colour.drift(images(4, shift), DATA)
    assert (warning is not None) == warned
    if warned:
        assert f'{levels / 127.5:+.3f}' in warning


@pytest.mark.parametrize(('count', 'warned'), [(16, False), (400, True)])
def test_it_does_not_warn_of_what_a_few_images_may_be_by_chance(count, warned):
    """Means that scatter by ±40 levels: four standard errors are 40 levels of 16 images, 8 of 400."""
    _, warning = colour.drift(images(count, shift=(10, 10, 10), spread=40), DATA)
    assert (warning is not None) == warned


def test_one_that_is_grey_has_one_channel():
    found, warning = colour.drift(np.full((3, 2, 2, 1), 255, np.uint8), [0.0])
    np.testing.assert_allclose(found, [2])
    assert '+2.000' in warning
