"""The images, the order in which training sees them, and the way to floats and back."""

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import data

LEVELS = np.arange(256, dtype=np.uint8)


def load(split='train', **changes):
    return data.load(**{'source': 'digits', 'split': split, 'image_size': 8, 'channels': 1, **changes})


def test_digits_are_all_of_scikit_learns_each_in_one_split():
    train, test = load('train').images, load('test').images
    assert train.shape == (1498, 8, 8, 1) and test.shape == (299, 8, 8, 1)
    assert train.dtype == test.dtype == np.uint8
    everything = sklearn.datasets.load_digits().images.reshape(1797, 64)
    ours = np.concatenate([train, test]).reshape(1797, 64) / 255 * 16
    assert sorted(map(tuple, everything)) == sorted(map(tuple, np.round(ours)))
    assert np.abs(ours - np.round(ours)).max() <= 0.5 * 16 / 255  # a grey level is rounded, and no more


def test_digits_use_the_whole_range_in_17_levels():
    levels = np.unique(load().images)
    assert len(levels) == 17 and levels[0] == 0 and levels[-1] == 255
    assert np.ptp(np.diff(levels.astype(int))) <= 1


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'source': 'digit'}, ("'digit'", 'digits', 'folder:', 'tfds:')),
        ({'split': 'valid'}, ("'valid'", 'train', 'test')),
        ({'crop': 'ddim'}, ("'ddim'", 'crop')),
        ({'image_size': 16}, ('image_size=16', 'image_size=8')),
        ({'channels': 3}, ('channels=3', 'channels=1')),
    ],
)
def test_what_cannot_be_loaded_is_named(changes, words):
    with pytest.raises(ValueError) as error:
        load(**changes)
    for word in words:
        assert word in str(error.value)


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_each_epoch_holds_each_image_once(num_images, batch_size, seed):
    """Also where a batch holds the end of one epoch and the start of the next, or several epochs."""
    order = data.Order(num_images, batch_size, seed)
    num_batches = -(-3 * num_images // batch_size)
    batches = [order[k] for k in range(num_batches)]
    assert all(batch.shape == (batch_size,) for batch in batches)
    epochs = np.concatenate(batches)[: 3 * num_images].reshape(3, num_images)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_images), (3, 1)))


def test_a_batch_is_a_function_of_seed_and_step():
    order = data.Order(100, 32, seed=7)
    in_turn = [order[k] for k in range(12)]
    for k in (11, 3, 0, 7, 3):
        np.testing.assert_array_equal(data.Order(100, 32, seed=7)[k], in_turn[k])
    assert set(data.Order(100, 32, seed=7)[10**6]) <= set(range(100))


def epochs(seed):
    order = data.Order(100, 100, seed)
    return [tuple(order[k]) for k in range(4)]


def test_epochs_differ_and_so_do_seeds():
    assert len({*epochs(0), tuple(range(100))}) == 5
    assert all(one != other for one, other in zip(epochs(0), epochs(1), strict=True))


def test_the_next_seed_is_not_the_same_order_one_epoch_later():
    """Were epoch k of seed n shuffled by n + k, runs that repeat an experiment with the next seed would not be
    independent of each other."""
    assert not set(epochs(0)) & set(epochs(1))


def test_levels_come_back_from_floats():
    floats = data.to_float(LEVELS)
    assert floats.dtype == np.float32
    assert floats[0] == -1 and floats[-1] == 1
    np.testing.assert_allclose(floats.astype(np.float64), LEVELS / 127.5 - 1, atol=1e-7)
    for back in (data.to_uint8(floats), data.to_uint8(jnp.asarray(floats))):
        assert isinstance(back, np.ndarray) and back.dtype == np.uint8
        np.testing.assert_array_equal(back, LEVELS)


@given(st.floats(-1, 1, width=32))
def test_floats_go_to_the_nearest_level(x):
    assert abs(int(data.to_uint8(np.float32(x))) - (x + 1) * 127.5) <= 0.5 + 1e-4


def test_rounding_has_no_bias():
    """Cutting off would be half a level too dark (FIELD.md 2.15)."""
    x = np.linspace(-1, 1, 100_001)
    assert abs(np.mean(data.to_uint8(x) - (x + 1) * 127.5)) < 0.005


def test_what_is_out_of_range_is_clipped():
    x = np.array([-np.inf, -7.0, -1.001, 1.001, 1.004, 3.0, np.inf], np.float32)
    np.testing.assert_array_equal(data.to_uint8(x), [0, 0, 0, 255, 255, 255, 255])
