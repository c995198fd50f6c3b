"""The limit on the memory that threads use together."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from diffusion.data import pictures
from diffusion.data.budget import Budget
from tests.galleries import encoded, noise


def test_threads_never_hold_more_than_there_is():
    """And all of them get their part, also one who asks for more than there is."""
    budget, lock, held, most = Budget(10), threading.Lock(), 0, 0

    def use(nbytes):
        nonlocal held, most
        with budget.taking(nbytes):
            with lock:
                held += min(nbytes, 10)
                most = max(most, held)
            time.sleep(0.001)
            with lock:
                held -= min(nbytes, 10)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(use, [1, 3, 25, 2, 7, 4] * 10))
    assert 7 <= most <= 10 and held == 0


def test_a_large_part_is_served_before_small_ones_that_come_later():
    budget, served = Budget(10), []
    free = threading.Event()

    def use(name, nbytes):
        with budget.taking(nbytes):
            served.append(name)

    def hold():
        with budget.taking(5):
            free.wait()

    threads = [threading.Thread(target=hold)]
    threads += [threading.Thread(target=use, args=(name, nbytes)) for name, nbytes in [('large', 10), ('small', 1)]]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    assert served == []
    free.set()
    for thread in threads:
        thread.join()
    assert served == ['large', 'small']


def test_an_error_gives_the_memory_back(monkeypatch):
    """The second picture would wait for ever."""
    monkeypatch.setattr(pictures, 'memory', Budget(pictures.DECODING_BYTES_PER_PIXEL * 40 * 40))
    picture = noise(1, 40, 40, 3)[0]
    for content in (encoded(picture)[:500], encoded(picture)):
        try:
            np.testing.assert_array_equal(pictures.decode(content), picture)
        except ValueError:
            assert len(content) == 500


def test_pictures_are_decoded_one_after_the_other_if_memory_is_short(monkeypatch):
    """No more of them at a time than the budget allows."""
    decoding, together, original = set(), [], pictures._load

    def load(image):
        decoding.add(threading.get_ident())
        together.append(len(decoding))
        time.sleep(0.005)
        try:
            return original(image)
        finally:
            decoding.discard(threading.get_ident())

    monkeypatch.setattr(pictures, '_load', load)
    images = noise(8, 20, 20, 3)
    for most in (1, 3):
        monkeypatch.setattr(pictures, 'memory', Budget(most * pictures.DECODING_BYTES_PER_PIXEL * 20 * 20))
        together.clear()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(pictures.decode, map(encoded, images)))
        np.testing.assert_array_equal(found, images)
        assert max(together) <= most
