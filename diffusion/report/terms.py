"""The consistency terms of the ELBO over the noise levels."""

import os

import matplotlib
import numpy as np


def save_terms(path, levels, forms):
    """Draw −consistency of each form over the level s: mean and middle 80 % of the images, and the spread by itself.

    levels: (n_levels,); forms: {name: (images, n_levels) nats, one draw each}.
    """
    matplotlib.use('agg')
    import matplotlib.pyplot as plt

    figure, (terms_ax, spread_ax) = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
    for name, terms in forms.items():
        low, high = np.quantile(-terms, [0.1, 0.9], axis=0)
        (line,) = terms_ax.plot(levels, -terms.mean(axis=0), label=f'{name}: mean', linewidth=1)
        band = dict(alpha=0.25, linewidth=0, color=line.get_color(), label=f'{name}: 80 % of the draws')
        terms_ax.fill_between(levels, low, high, **band)
        spread_ax.plot(levels, terms.std(axis=0), label=name, linewidth=1)
    terms_ax.set(title='consistency terms', ylabel='−term (nats/image)')
    spread_ax.set(title='standard deviation of one draw', ylabel='nats/image', yscale='log')
    for ax in (terms_ax, spread_ax):
        ax.set(xlabel='noise level s', xscale='log')
        ax.legend(fontsize='small')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
