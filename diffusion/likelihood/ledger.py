"""The ledger: every likelihood of the derivation side by side, from the values of each image."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion.likelihood.elbo import FORMS


class Row(NamedTuple):
    """One quantity, as its mean over images.

    Attributes:
        quantity: what it is.
        equation: where it is defined.
        nats: its mean over images.
        standard_error: of `nats`; None for a single image.
        bits_per_dim: −nats/(dimensions·log 2).
        n: the number of images.
    """

    quantity: str
    equation: str
    nats: float
    standard_error: float | None
    bits_per_dim: float
    n: int


def row(quantity: str, equation: str, values: Float[np.ndarray, 'n'], dimensions: int) -> Row:
    """Average one quantity over images.

    Args:
        quantity: what it is.
        equation: where it is defined.
        values: (n,) nats, one value for each image.
        dimensions: the number of values of an image.

    Returns:
        The row of the ledger.
    """
    values = np.asarray(values, np.float64)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    mean = float(values.mean())
    return Row(quantity, equation, mean, error, -mean / (dimensions * math.log(2)), len(values))


def importance_bounds(
    log_weights: Float[np.ndarray, 'K n'],
) -> dict[int, tuple[Float[np.ndarray, 'n'], Float[np.ndarray, 'n']]]:
    """The importance-weighted bounds of the first 1, 2, 4, … and of all K trajectories.

    Args:
        log_weights: (K, n) nats, of each trajectory and image.

    Returns:
        For each number k of trajectories the bound log 1/k Σw (n,) in nats, and the effective sample size (Σw)²/Σw²
        (n,), in [1, k].
    """
    log_weights = np.asarray(log_weights, np.float64)
    bounds = {}
    for k in sorted({2**i for i in range(len(log_weights).bit_length())} | {len(log_weights)}):
        largest = log_weights[:k].max(axis=0)
        weights = np.exp(log_weights[:k] - largest)
        bounds[k] = largest + np.log(weights.mean(axis=0)), weights.sum(axis=0) ** 2 / (weights**2).sum(axis=0)
    return bounds


def ledger(values: Mapping[str, Any], dimensions: int) -> list[Row]:
    """Make all rows that `values` allow.

    Args:
        values: nats of n images. Possible keys are those of `elbo.FORMS`, with
            {'reconstruction', 'prior', 'consistency': (n,)}; 'importance', with the log-weights (K, n); and 'flow',
            with {'reconstruction', 'entropy', 'density': (n,)}.
        dimensions: the number of values of an image.

    Returns:
        The rows, in the order of the derivation.
    """
    rows = []
    for name, form in FORMS.items():
        if name in values:
            parts = {part: values[name][part] for part in ('reconstruction', 'prior', 'consistency')}
            parts['total'] = sum(parts.values())
            rows += [row(f'{form.title}: {part}', form.equation, parts[part], dimensions) for part in parts]
    if 'importance' in values:
        bounds = importance_bounds(values['importance'])
        rows += [
            row(f'importance-weighted bound, K = {k} (ESS {count.mean():.1f})', 'Eq. (1)', bound, dimensions)
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
        gap_row = row(f'gap: K = {k} minus ELBO, at most KL(q ‖ p(x_1…x_T|x_0))', 'Eq. (6)', gap, dimensions)
        rows.append(gap_row._replace(bits_per_dim=-gap_row.bits_per_dim))  # bits saved, not bits paid
    return rows


def markdown(rows: Iterable[Row]) -> str:
    """Format the rows as a Markdown table.

    Args:
        rows: those of `ledger`.

    Returns:
        The table, one line for each row.
    """
    lines = ['| quantity | equation | nats/image | bits/dim | std. error (nats) | n |', '|---|---|---:|---:|---:|---:|']
    for r in rows:
        error = '–' if r.standard_error is None else f'{r.standard_error:.3f}'
        quantity = r.quantity.replace('|', r'\|')
        lines.append(f'| {quantity} | {r.equation} | {r.nats:.3f} | {r.bits_per_dim:.4f} | {error} | {r.n} |')
    return '\n'.join(lines) + '\n'


def markdown_of_classes(classes: Mapping[str, Iterable[Row]]) -> str:
    """Format the likelihoods of each class as a Markdown table.

    Args:
        classes: {class: its rows, those of `ledger`}.

    Returns:
        The table, one line for each class: the totals, and the importance-weighted bound with the most trajectories.
    """
    text = ''
    for name, rows in classes.items():
        chosen = {r.quantity.partition(':')[0]: r for r in rows if ': total' in r.quantity}
        *_, last = [None, *(r for r in rows if r.quantity.startswith('importance'))]
        chosen |= {'importance-weighted bound': last} if last else {}
        if not text:
            text = f'| bits/dim of the class | n | {" | ".join(chosen)} |\n|---|---:|{"---:|" * len(chosen)}\n'
        cells = []
        for r in chosen.values():
            error = '' if r.standard_error is None else f' ± {abs(r.standard_error * r.bits_per_dim / r.nats):.4f}'
            cells.append(f'{r.bits_per_dim:.4f}{error}')
        count = next(iter(chosen.values())).n
        text += f'| {name.replace("|", "")} | {count} | {" | ".join(cells)} |\n'
    return text
