"""The ledger's arithmetic, against scipy and by hand."""

import re

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from diffusion.likelihood import ledger
from diffusion.likelihood.elbo import FORMS, Form


def test_a_row_by_hand():
    row = ledger.row('name', 'Eq. (1)', [-64 * np.log(2), -192 * np.log(2)], 64)
    assert row.bits_per_dim == pytest.approx(2.0)  # 64 and 192 bits over 64 values are 1 and 3
    assert row.nats == pytest.approx(-128 * np.log(2)) and row.n == 2
    assert row.standard_error == pytest.approx(64 * np.log(2))  # for two values half their distance
    assert ledger.row('name', '', [-3.0], 4).standard_error is None


@given(
    arrays.arrays(np.float64, st.tuples(st.integers(1, 20), st.integers(1, 3)), elements=st.floats(-30_000, -29_900))
)
def test_importance_bounds_are_log_mean_exp(log_weights):
    bounds = ledger.importance_bounds(log_weights)
    K = len(log_weights)
    assert list(bounds) == [k for k in range(1, K + 1) if k in (1, 2, 4, 8, 16, K)]
    for k, (bound, count) in bounds.items():
        np.testing.assert_allclose(bound, scipy.special.logsumexp(log_weights[:k], axis=0) - np.log(k))
        assert np.all((count >= 1 - 1e-9) & (count <= k + 1e-9))
    np.testing.assert_allclose(bounds[1][0], log_weights[0])


def test_equal_weights_count_in_full_and_a_dominant_one_counts_alone():
    assert ledger.importance_bounds(np.full((4, 1), -1e4))[4][1] == pytest.approx(4)
    assert ledger.importance_bounds(np.array([[0.0], [-1e4], [-1e4], [-1e4]]))[4][1] == pytest.approx(1)


def test_all_rows():
    rng = np.random.default_rng(0)
    parts = {form: {p: rng.normal(size=50) for p in ('prior', 'consistency', 'reconstruction')} for form in FORMS}
    flow = {p: rng.normal(size=50) for p in ('reconstruction', 'entropy', 'density')}
    weights = rng.normal(size=(5, 50))
    rows = ledger.ledger(parts | {'importance': weights, 'flow': flow}, 64)
    by_name = {row.quantity.split(' (')[0]: row for row in rows}
    for name, form in FORMS.items():
        total = sum(by_name[f'{form.title}: {part}'].nats for part in parts[name])
        assert by_name[f'{form.title}: total'].nats == pytest.approx(total)
    assert by_name['flow: total, of its own model'].nats == pytest.approx(sum(v.mean() for v in flow.values()))
    bound = scipy.special.logsumexp(weights, axis=0) - np.log(5)
    gap = bound - sum(parts['posterior'].values())
    row = rows[-1]
    assert row.quantity.startswith('gap: K = 5') and row.nats == pytest.approx(gap.mean())
    assert row.standard_error == pytest.approx(gap.std(ddof=1) / np.sqrt(50))  # paired, image by image
    assert row.bits_per_dim == pytest.approx(gap.mean() / 64 / np.log(2))
    assert {row.n for row in rows} == {50}
    table = ledger.markdown(rows).splitlines()
    assert len(table) == 2 + len(rows) and {len(re.findall(r'(?<!\\)\|', line)) for line in table} == {7}


def test_quantities_without_values_have_no_rows():
    assert ledger.ledger({'importance': np.zeros((1, 2))}, 1)[0].quantity.startswith('importance-weighted bound, K = 1')


def test_a_form_added_to_the_table_has_its_rows(monkeypatch):
    monkeypatch.setitem(FORMS, 'mine', Form('my form', 'Eq. (0)', None, None))
    values = {
        part: np.full(2, value) for part, value in (('reconstruction', -1.0), ('prior', -2.0), ('consistency', -4.0))
    }
    rows = ledger.ledger({'mine': values}, 1)
    assert [(row.quantity, row.equation) for row in rows][-1] == ('my form: total', 'Eq. (0)')
    assert rows[-1].nats == -7
