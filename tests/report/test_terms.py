"""The plot of the ELBO's terms."""

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from diffusion.report.terms import save_terms

TERMS = -np.array([[1.0, 10.0], [3.0, 20.0]])
FORMS = {'one': TERMS, 'two': 2 * TERMS}


def test_the_plot_shows_mean_interval_and_spread(tmp_path, monkeypatch):
    """With the sign of a KL."""
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *_, **__: figures.append(figure))
    save_terms(str(tmp_path / 'terms.png'), [2, 1], FORMS)
    ((means, spreads),) = (figure.axes for figure in figures)
    for i, scale in enumerate([1, 2]):
        np.testing.assert_allclose(means.lines[i].get_xydata(), [[2, scale * 2], [1, scale * 15]])
        np.testing.assert_allclose(spreads.lines[i].get_xydata(), [[2, scale * 1], [1, scale * 5]])
        band = means.collections[i].get_paths()[0].vertices
        assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((scale * 1.2, scale * 19))


def test_the_file_is_a_picture_and_pyplot_is_not_involved(tmp_path, monkeypatch):
    """pyplot keeps figures and a backend for the whole process."""
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)
    save_terms(str(tmp_path / 'folder' / 'terms.png'), [2, 1], FORMS)
    with Image.open(tmp_path / 'folder' / 'terms.png') as picture:
        assert picture.width > picture.height > 300 and np.ptp(np.asarray(picture)) == 255
