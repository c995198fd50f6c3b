"""A plot of the consistency terms of the ELBO over the noise levels."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Real

from diffusion.util import replacing


def save_terms(
    path: str,
    levels: Real[np.ndarray, 'levels'] | Sequence[float],
    forms: Mapping[str, Float[np.ndarray, 'images levels']],
) -> None:
    """Plot the consistency terms of each form of the ELBO, and the standard deviation of one draw.

    The left plot shows the mean over the images, and the interval that contains the middle 80 % of them.

    Args:
        path: the file; its folder is created if it does not exist.
        levels: (levels,) noise levels s.
        forms: {name of the form: its terms, (images, levels) in nats, each from one draw of the noise}.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(11, 4.2), layout='constrained')
    terms_ax, spread_ax = figure.subplots(1, 2)
    for name, terms in forms.items():
        low, high = np.quantile(-terms, [0.1, 0.9], axis=0)
        (line,) = terms_ax.plot(levels, -terms.mean(axis=0), label=f'{name}: mean', linewidth=1)
        band = {'alpha': 0.25, 'linewidth': 0, 'color': line.get_color(), 'label': f'{name}: 80 % of the draws'}
        terms_ax.fill_between(levels, low, high, **band)
        spread_ax.plot(levels, terms.std(axis=0), label=name, linewidth=1)
    terms_ax.set(title='consistency terms', ylabel='−term (nats/image)')
    spread_ax.set(title='standard deviation of one draw', ylabel='nats/image', yscale='log')
    for ax in (terms_ax, spread_ax):
        ax.set(xlabel='noise level s', xscale='log')
        ax.legend(fontsize='small')
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format='png')
