"""Measure for how long a checkpoint of the 35.7M-parameter network blocks the training loop.

    python -m benchmarks.saving

The state (parameters, EMA, Adam: 572 MB) is copied; writing it to disk happens in the background.
"""

import tempfile
import time

import jax
import numpy as np

from benchmarks.record import store
from diffusion import build
from diffusion.configs import cifar10
from diffusion.runtime.checkpoints import Checkpoints


def main(repetitions: int = 8) -> None:
    """Save a few checkpoints, each after the previous one is written, and store the figures."""
    exp = build.build(cifar10.get_config())
    state = exp.initial_state(jax.random.key(0))
    trees = state.trees()
    stalls, writes = [], []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=1, writing=True) as checkpoints:
        checkpoints.reserve(**trees)
        time.sleep(5)  # in training, many steps precede the first checkpoint
        for step in range(repetitions):
            start = time.perf_counter()
            checkpoints.save(step, **trees)
            stalls.append(time.perf_counter() - start)
            checkpoints.wait()
            writes.append(time.perf_counter() - start)
    result = {
        'state megabytes': sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6,
        'stall seconds, median': float(np.median(stalls)),
        'stall seconds, all': stalls,
        'seconds until it is written, all': writes,
    }
    store('saving', result)


if __name__ == '__main__':
    main()
