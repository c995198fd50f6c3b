"""The order in which training sees the images, the batches gathered ahead, and the conversion to floats and back."""

import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import data
from diffusion.data.order import DOMAIN
from tests.galleries import encoded, fill, noise

LEVELS = np.arange(256, dtype=np.uint8)
IMAGES = noise(40, 8, 8, 1)

# The order.


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_each_epoch_contains_each_image_once(num_images, batch_size, seed):
    """Even if a batch contains the end of one epoch and the start of the next, or several epochs."""
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
    """Return the first four epochs of 100 images."""
    order = data.Order(100, 100, seed)
    return [tuple(order[k]) for k in range(4)]


def test_epochs_and_seeds_differ():
    assert len({*epochs(0), tuple(range(100))}) == 5
    assert all(one != other for one, other in zip(epochs(0), epochs(1), strict=True))


def test_the_next_seed_is_not_the_same_order_one_epoch_later():
    """If epoch k of seed n depended on n + k, experiments repeated with the next seed would not be independent."""
    assert not set(epochs(0)) & set(epochs(1))


@pytest.mark.parametrize('words', [(0,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0), (2, 0, 0)])
def test_the_order_has_a_domain_of_its_own(words):
    """Other uses of seed 0 in a SeedSequence, alone or beside small numbers, draw other words."""
    other = np.argsort(np.random.Philox(np.random.SeedSequence(list(words))).random_raw(100), kind='stable')
    assert tuple(other) not in epochs(0)
    assert 2**16 < DOMAIN < 2**32  # one word, and not a number that others would choose


@settings(max_examples=30)
@given(st.integers(4, 60), st.integers(1, 8), st.integers(0, 2**31 - 1), st.integers(0, 50))
def test_hosts_take_parts_of_the_same_batch(num_images, size, seed, step):
    """Their parts, concatenated, are the batch of a single host."""
    whole = data.Order(num_images, 4 * size, seed)[step]
    for hosts in (1, 2, 4):
        parts = [data.Order(num_images, 4 * size, seed, host=host, hosts=hosts)[step] for host in range(hosts)]
        assert {part.shape for part in parts} == {(4 * size // hosts,)}
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        assert whole.dtype == parts[0].dtype == np.int32


def test_a_batch_that_hosts_cannot_divide_is_an_error():
    with pytest.raises(ValueError, match=r'batch of 6 images .* 4 hosts'):
        data.Order(40, 6, 0, host=0, hosts=4)


# Shards.


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
    st.integers(0, 50),
)
def test_a_batch_of_shards_is_the_same_for_any_number_of_hosts(sizes, size, seed, step):
    """And a host needs only the shards of its own rows. Indices count the images of a host's shards."""
    shards, batch = len(sizes), len(sizes) * size
    whole = data.Order(sizes, batch, seed, shards=shards)[step]
    starts = np.cumsum([0, *sizes])
    of_rows = np.searchsorted(starts, whole, side='right') - 1  # the shard of each image of the batch
    for hosts in range(1, batch + 1):
        if batch % hosts:
            continue
        for host, rows in enumerate(np.split(np.arange(batch), hosts)):
            mine = data.own_shards(shards, host, hosts)
            assert list(mine) == np.unique(of_rows[rows]).tolist()
            order = data.Order(sizes[mine.start : mine.stop], batch, seed, host=host, hosts=hosts, shards=shards)
            np.testing.assert_array_equal(order[step] + starts[mine.start], whole[rows])


def test_each_shard_gives_its_images_once_in_each_of_its_epochs():
    sizes = (5, 12, 7)
    order = data.Order(sizes, 6, seed=3, shards=3)
    rows = np.stack([order[k] for k in range(30)])  # two of each shard in each step
    for shard, start in enumerate((0, 5, 17)):
        seen = rows[:, 2 * shard : 2 * shard + 2].ravel() - start
        for epoch in range(60 // sizes[shard]):
            part = seen[epoch * sizes[shard] : (epoch + 1) * sizes[shard]]
            np.testing.assert_array_equal(np.sort(part), np.arange(sizes[shard]))


def test_shards_have_orders_of_their_own():
    """One shard is the order without shards; others share no random numbers with it or with each other."""
    rows = data.Order((100, 100, 100), 300, seed=0, shards=3)[0]
    orders = [tuple(part - 100 * i) for i, part in enumerate(np.split(rows, 3))]
    assert len({*orders, *epochs(0), *epochs(1)}) == 10  # the first is that of a data set of one shard
    assert orders[0] == epochs(0)[0]
    np.testing.assert_array_equal(data.Order([100], 32, seed=5)[9], data.Order(100, 32, seed=5)[9])


@pytest.mark.parametrize(
    ('sizes', 'changes', 'words'),
    [
        ((9, 9, 9), {'shards': 3}, 'a batch of 8 images cannot be divided evenly among 3 shards'),
        ((9,), {'shards': 4, 'hosts': 3}, 'a batch of 8 images cannot be divided evenly among 3 hosts'),
        ((9, 9), {'shards': 4}, 'num_images has 2 sizes, but this host has 4 shards'),
        ((9, 9), {'shards': 4, 'hosts': 8}, 'num_images has 2 sizes, but this host has 1 shards'),
    ],
)
def test_shards_that_cannot_be_divided_are_an_error(sizes, changes, words):
    with pytest.raises(ValueError, match=words):
        data.Order(sizes, 8, 0, **changes)


# Batches gathered ahead.


@pytest.mark.parametrize('kind', ['memory', 'cache', 'undecoded'])
def test_batches_gathered_ahead_are_in_order(tmp_path, kind):
    """Across the ends of epochs, and from any first step."""
    images = data.Images(IMAGES, None, {})
    if kind != 'memory':
        root = fill(tmp_path / 'pictures', {f'{i:02d}.png': encoded(image) for i, image in enumerate(IMAGES)})
        images = data.load(
            f'folder:{root}', image_size=8, channels=1, cache=kind == 'cache', cache_dir=str(tmp_path / 'cache')
        )
    order = data.Order(40, 16, seed=3)
    for start in (0, 7, 29):
        batches = list(data.prefetch(images, order, start, 30))
        assert len(batches) == 30 - start
        for k, batch in enumerate(batches, start):
            assert batch.dtype == np.uint8
            np.testing.assert_array_equal(batch, IMAGES[order[k]])


def test_hosts_gather_their_own_parts():
    images, steps = data.Images(IMAGES, None, {}), (5, 9)
    whole = list(data.prefetch(images, data.Order(40, 16, 0), *steps))
    parts = [data.prefetch(images, data.Order(40, 16, 0, host=host, hosts=4), *steps) for host in range(4)]
    for batch, *shares in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(shares), batch)


def test_batches_are_gathered_before_they_are_needed():
    """During a step, the batches of the next steps are gathered."""
    gathered = []

    class Slow:
        def __getitem__(self, indices):
            time.sleep(0.02)
            gathered.append(indices)
            return IMAGES[indices]

    batches = data.prefetch(data.Images(Slow(), None, {}), data.Order(40, 4, 0), 0, 100)
    next(batches)
    deadline = time.monotonic() + 30
    while len(gathered) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(gathered) >= 5
    time.sleep(0.2)
    assert len(gathered) < 60  # but not all of them, which would fill the memory


# Levels and floats.


def test_levels_survive_the_conversion_to_floats():
    floats = data.to_float(LEVELS)
    assert floats.dtype == np.float32
    assert floats[0] == -1 and floats[-1] == 1
    np.testing.assert_allclose(floats.astype(np.float64), LEVELS / 127.5 - 1, atol=1e-7)
    for levels in (data.to_uint8(floats), data.to_uint8(jnp.asarray(floats))):
        assert isinstance(levels, np.ndarray) and levels.dtype == np.uint8
        np.testing.assert_array_equal(levels, LEVELS)


@given(st.floats(-1, 1, width=32))
def test_floats_are_rounded_to_the_nearest_level(x):
    assert abs(int(data.to_uint8(np.float32(x))) - (x + 1) * 127.5) <= 0.5 + 1e-4


def test_rounding_has_no_bias():
    """Truncation would be half a level too dark (FIELD.md 2.15)."""
    x = np.linspace(-1, 1, 100_001)
    assert abs(np.mean(data.to_uint8(x) - (x + 1) * 127.5)) < 0.005


def test_floats_out_of_range_are_clipped():
    x = np.array([-np.inf, -7.0, -1.001, 1.001, 1.004, 3.0, np.inf], np.float32)
    np.testing.assert_array_equal(data.to_uint8(x), [0, 0, 0, 255, 255, 255, 255])
