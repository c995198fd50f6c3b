"""The Inception score where it is known, and the coverage of its error."""

import numpy as np
import pytest

from diffusion.metrics import inception_score
from diffusion.metrics.tables import METRICS, Comparison


def test_certain_and_balanced_classes_have_the_score_of_their_number():
    logits = 1000.0 * np.eye(8)[np.arange(400) % 8]
    for definition in (inception_score.adm, inception_score.torch_fidelity):
        # The random parts of 40 images are not quite balanced.
        assert definition(logits).value == pytest.approx(8, rel=0.1)
    assert inception_score.adm(logits).value == pytest.approx(8)


def test_equal_images_have_the_score_1():
    logits = np.broadcast_to(np.random.default_rng(0).normal(size=10), (100, 10))
    for definition in (inception_score.adm, inception_score.torch_fidelity):
        found = definition(logits)
        assert found.value == pytest.approx(1) and found.standard_error == pytest.approx(0, abs=1e-9)


def test_adm_takes_blocks_of_5000_in_order():
    """Each block has one class: each scores 1, though both together would score more."""
    logits = 1000.0 * np.eye(2)[np.arange(7000) // 5000]
    assert inception_score.adm(logits).value == pytest.approx(1)
    assert inception_score.torch_fidelity(logits).value > 1.5


def test_the_standard_error_covers_the_mean_over_repetitions():
    rng = np.random.default_rng(0)
    found = [inception_score.torch_fidelity(2 * rng.normal(size=(600, 5))) for _ in range(200)]
    values, errors = (np.array([getattr(one, name) for one in found]) for name in ('value', 'standard_error'))
    assert 178 <= np.sum(np.abs(values - values.mean()) < 1.96 * errors) <= 199


def test_an_influence_is_what_the_score_loses_without_the_image():
    """Of one block, where the change is nearly linear; and of parts, each of which has influences of mean 0."""
    logits = 2 * np.random.default_rng(0).normal(size=(400, 5))
    found = inception_score.adm(logits)
    without = [inception_score.adm(np.delete(logits, i, axis=0)).value for i in range(400)]
    np.testing.assert_allclose(399 * (found.value - np.array(without)), found.influences, atol=0.03)
    assert np.std(found.influences) > 0.3
    found = inception_score.torch_fidelity(logits)
    parts = found.influences[np.random.RandomState(2020).permutation(400)].reshape(10, 40)
    np.testing.assert_allclose(parts.mean(axis=1), 0, atol=1e-12)
    assert found.standard_error == pytest.approx(np.std(parts) / 20)


def test_fewer_images_than_parts_are_refused():
    with pytest.raises(ValueError, match='at least 10 images, but there are 9'):
        inception_score.torch_fidelity(np.zeros((9, 3)))


def test_each_dialect_has_its_definition():
    logits = np.random.default_rng(0).normal(size=(25, 6))
    for dialect, definition in (('adm', inception_score.adm), ('torch-fidelity', inception_score.torch_fidelity)):
        found = METRICS['inception-score'].compute(Comparison(logits, None, None, dialect))
        expected = definition(logits)._asdict()
        assert found.pop('bias').startswith('downwards') and found.keys() == expected.keys()
        np.testing.assert_array_equal(found.pop('influences'), expected.pop('influences'))
        assert found == expected
