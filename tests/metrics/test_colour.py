"""The colour drift of images whose channel means are known."""

import numpy as np
import pytest

from diffusion.metrics import colour

DATA = (100.0, 150.0, 200.0)


def images(count, shift=(0, 0, 0), spread=0):
    """Return flat images whose channel means are the data's, shifted, and alternately ± spread, in levels 0 … 255."""
    signs = np.where(np.arange(count) % 2, 1, -1)[:, None]
    means = np.asarray(DATA) + shift + spread * signs
    return np.broadcast_to(means[:, None, None], (count, 4, 4, 3)).astype(np.uint8)


def test_the_drift_is_the_difference_of_the_means_in_units_of_minus_one_to_one():
    found, _ = colour.drift(images(10, shift=(5, 0, -20), spread=30), DATA)
    np.testing.assert_allclose(found, np.array([5, 0, -20]) / 127.5, atol=1e-12)


@pytest.mark.parametrize('channel', range(3))
@pytest.mark.parametrize(('levels', 'warned'), [(6, False), (7, True), (-6, False), (-7, True)])
def test_a_visible_drift_in_any_channel_gives_a_warning(channel, levels, warned):
    """0.05 in units of [−1, 1] are 6.4 levels; identical images have no standard error."""
    shift = np.zeros(3)
    shift[channel] = levels
    _, warning = colour.drift(images(4, shift), DATA)
    assert (warning is not None) == warned
    if warned:
        assert f'{levels / 127.5:+.3f}' in warning


@pytest.mark.parametrize(('count', 'levels', 'warned'), [(16, 18, False), (16, 22, True), (400, 18, True)])
def test_a_drift_within_four_standard_errors_gives_no_warning(count, levels, warned):
    """The means scatter by ±20 levels: four standard errors are 20 levels for 16 images, and 4 for 400."""
    _, warning = colour.drift(images(count, shift=(levels, levels, levels), spread=20), DATA)
    assert (warning is not None) == warned


def test_grey_images_have_one_channel():
    found, warning = colour.drift(np.full((3, 2, 2, 1), 255, np.uint8), [0.0])
    np.testing.assert_allclose(found, [2])
    assert '+2.000' in warning
