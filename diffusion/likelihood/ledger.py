"""The ledger: every likelihood of the derivation side by side, from the values of each image."""

import math
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """A quantity of log p(x_0): its mean over images."""

    quantity: str
    equation: str
    nats: float  # an image
    standard_error: float | None  # of nats; None for a single image
    bits_per_dim: float  # −nats/(dimensions·log 2)
    n: int  # images


def row(quantity, equation, values, dimensions):
    """The Row of one value (n,) in nats for each image of so many dimensions."""
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    mean = float(values.mean())
    return Row(quantity, equation, mean, error, -mean / (dimensions * math.log(2)), len(values))


def importance_bounds(log_weights):
    """The bounds of the first 1, 2, 4, … and of all K trajectories, and their effective numbers.

    log_weights: (K, n) nats. Returns {k: (bound (n,), (Σw)²/Σw² (n,))}.
    """
    log_weights = np.asarray(log_weights, np.float64)
    bounds = {}
    for k in sorted({2**i for i in range(len(log_weights).bit_length())} | {len(log_weights)}):
        largest = log_weights[:k].max(axis=0)
        weights = np.exp(log_weights[:k] - largest)
        bounds[k] = largest + np.log(weights.mean(axis=0)), weights.sum(axis=0) ** 2 / (weights**2).sum(axis=0)
    return bounds


FORMS = {
    'posterior': ('ELBO, posterior form', 'DDPM Eq. 5'),
    'transition': ('ELBO, transition form', 'Eq. (8)'),
    'printed': ('as printed, which is not the ELBO', 'Eq. (9)'),
}


def ledger(values, dimensions):
    """All rows that `values` allow.

    values: {'posterior' | 'transition' | 'printed': {'reconstruction', 'prior', 'consistency': (n,)},
    'importance': (K, n), 'flow': {'reconstruction', 'entropy', 'density': (n,)}}, nats, any of them.
    """
    rows = []
    for form, (name, equation) in FORMS.items():
        if form in values:
            parts = {part: values[form][part] for part in ('reconstruction', 'prior', 'consistency')}
            parts['total'] = sum(parts.values())
            rows += [row(f'{name}: {part}', equation, parts[part], dimensions) for part in parts]
    if 'importance' in values:
        bounds = importance_bounds(values['importance'])
        rows += [
            row(f'importance-weighted bound, K = {k} ({count.mean():.1f} count)', 'Eq. (1)', bound, dimensions)
            for k, (bound, count) in bounds.items()
        ]
    if 'flow' in values:
        density = values['flow']['density'] + values['flow']['entropy']
        parts = {
            'reconstruction at level 1': values['flow']['reconstruction'],
            'log p_ode(x_1) − log q(x_1|x_0)': density,
            'total, of its own model': density + values['flow']['reconstruction'],
        }
        rows += [row(f'flow: {part}', 'probability-flow ODE', parts[part], dimensions) for part in parts]
    if 'importance' in values and 'posterior' in values:
        k, (bound, _) = list(bounds.items())[-1]
        gap = bound - sum(values['posterior'].values())
        gap = row(f'gap: K = {k} minus ELBO, at most KL(q ‖ p(x_1…x_T|x_0))', 'Eq. (6)', gap, dimensions)
        rows.append(gap._replace(bits_per_dim=-gap.bits_per_dim))  # what is saved, not what is paid
    return rows


def markdown(rows):
    """The rows as a Markdown table."""
    lines = ['| quantity | equation | nats/image | bits/dim | std. error (nats) | n |', '|---|---|---:|---:|---:|---:|']
    for r in rows:
        error = '–' if r.standard_error is None else f'{r.standard_error:.3f}'
        quantity = r.quantity.replace('|', r'\|')
        lines.append(f'| {quantity} | {r.equation} | {r.nats:.3f} | {r.bits_per_dim:.4f} | {error} | {r.n} |')
    return '\n'.join(lines) + '\n'
