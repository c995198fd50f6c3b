"""Checkpoints: what is saved is restored bit by bit, whatever the disk and the process do meanwhile."""

import os
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from diffusion.runtime.checkpoints import Checkpoints
from tests.runtime.common import assert_same, describe, python

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lambda step: 0.1 / (1 + step)))
UPDATE = jax.jit(OPTIMIZER.update)


def make_trees(seed=0):
    """Return a small version of what training saves: nested parameters, and Adam's state after an update."""
    rng = np.random.default_rng(seed)
    params = {
        'conv': {'kernel': jnp.asarray(rng.normal(size=(3, 3, 1, 4)), jnp.float32), 'bias': jnp.zeros(4)},
        'a': {},
        'scale': jnp.asarray(rng.normal(), jnp.float32),
    }
    _, opt_state = UPDATE(params, OPTIMIZER.init(params), params)
    return {'params': params, 'ema': jax.tree.map(lambda leaf: leaf / 3, params), 'opt_state': opt_state}


def test_restores_bit_by_bit_and_in_part(tmp_path):
    trees = make_trees()
    with Checkpoints(tmp_path / 'checkpoints', keep=2, writing=True) as checkpoints:
        assert checkpoints.steps() == []
        checkpoints.save(3, **trees)
    with Checkpoints(tmp_path / 'checkpoints', keep=2) as checkpoints:
        assert checkpoints.steps()[0] == 3
        opt_state, params = checkpoints.restore(
            3, opt_state=describe(trees['opt_state']), params=describe(trees['params'])
        )
        (ema,) = checkpoints.restore(3, ema=describe(trees['ema']))
    assert_same(params, trees['params'])
    assert_same(ema, trees['ema'])
    assert_same(opt_state, trees['opt_state'])
    assert int(opt_state[1][0].count) == 1


def test_keeps_the_newest(tmp_path):
    trees_of = {step: make_trees(seed=step) for step in (1, 2, 5, 10)}
    with Checkpoints(tmp_path, keep=2, writing=True) as checkpoints:
        for step, trees in trees_of.items():
            checkpoints.save(step, **trees)
    assert sorted(int(folder.name) for folder in tmp_path.iterdir()) == [5, 10]
    with Checkpoints(tmp_path, keep=2, writing=True) as checkpoints:
        assert checkpoints.steps()[0] == 10
        for step in (5, 10):
            (params,) = checkpoints.restore(step, params=describe(trees_of[step]['params']))
            assert_same(params, trees_of[step]['params'])


def test_saved_buffers_may_be_overwritten_at_once(tmp_path):
    """The next training step reuses the buffers while Orbax still writes."""
    size = 2_000_000
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = step(jnp.zeros(size))
    with Checkpoints(tmp_path, keep=3, writing=True) as checkpoints:
        checkpoints.save(1, params={'x': x})
        for _ in range(20):
            x = step(x)
        jax.block_until_ready(x)
    with Checkpoints(tmp_path, keep=3, writing=True) as checkpoints:
        (params,) = checkpoints.restore(1, params=describe({'x': x}))
    np.testing.assert_array_equal(params['x'], np.ones(size))


def test_save_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """The first save is held up until the caller has continued; the second save waits for the first."""
    continued, save = threading.Event(), ocp.CheckpointManager.save
    monkeypatch.setattr(
        ocp.CheckpointManager, 'save', lambda *args, **kwargs: continued.wait(60) and save(*args, **kwargs)
    )
    x = jnp.zeros(1000)
    with Checkpoints(tmp_path, writing=True) as checkpoints:
        checkpoints.save(1, params={'x': x})
        assert not (tmp_path / '1').exists() and not checkpoints.failed
        continued.set()
        checkpoints.save(2, params={'x': x})
        assert (tmp_path / '1').exists()
    assert (tmp_path / '2').exists()


def test_a_failure_in_the_background_is_raised_later(tmp_path, monkeypatch):
    x = jnp.zeros(1000)
    with Checkpoints(tmp_path, writing=True) as checkpoints:
        checkpoints.save(1, params={'x': x})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, 'save', lambda *args, **kwargs: os.stat('/nowhere'))
            checkpoints.save(2, params={'x': x})
            while not checkpoints.failed:
                time.sleep(0.01)
            with pytest.raises(OSError, match='/nowhere'):
                checkpoints.wait()
        assert not checkpoints.failed and checkpoints.steps() == [1]
        checkpoints.save(3, params={'x': x})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 1]


def test_a_checkpoint_that_the_disk_has_no_room_for_is_refused(tmp_path, monkeypatch):
    """It takes up to 1.3 times the bytes of its arrays, and 2 MB."""
    x, usage = jnp.zeros(1_000_000), shutil.disk_usage(tmp_path)
    with Checkpoints(tmp_path, writing=True) as checkpoints:
        for free in (7_199_000, 7_201_000):
            with monkeypatch.context() as patch:
                patch.setattr(shutil, 'disk_usage', lambda path, free=free: usage._replace(free=free))
                if free < 1.3 * x.nbytes + 2e6:
                    with pytest.raises(OSError, match=r'takes 7\.2 MB'):
                        checkpoints.save(1, params={'x': x})
                    assert not checkpoints.steps()
                else:
                    checkpoints.save(1, params={'x': x})
        checkpoints.wait()
        assert checkpoints.steps() == [1]


# The process ends as soon as something of the second checkpoint is on the disk.
KILLED = """
import os, sys
import jax.numpy as jnp
from diffusion.runtime.checkpoints import Checkpoints
with Checkpoints(sys.argv[1], keep=3, writing=True) as checkpoints:
    checkpoints.save(1, params={'x': jnp.full(20, 1.0)})
with Checkpoints(sys.argv[1], keep=3, writing=True) as checkpoints:
    checkpoints.save(2, params={'x': jnp.full(10_000_000, 2.0)})
    while len(os.listdir(sys.argv[1])) < 2:
        pass
    os._exit(9)
"""


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    killed = python(KILLED, tmp_path)
    assert killed.returncode == 9, killed.stderr
    assert len(list(tmp_path.iterdir())) == 2
    with Checkpoints(tmp_path, keep=3, writing=True) as checkpoints:
        assert checkpoints.steps()[0] == 1
        (params,) = checkpoints.restore(1, params=describe({'x': jnp.zeros(20)}))
        np.testing.assert_array_equal(params['x'], np.ones(20))
        checkpoints.save(2, params={'x': jnp.full(20, 2.0)})  # what is left of the first attempt is not in the way
    with Checkpoints(tmp_path, keep=3, writing=True) as checkpoints:
        assert checkpoints.steps()[0] == 2
