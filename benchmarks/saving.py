"""How long the training loop stands still while a checkpoint of the 35.7M-parameter network is begun.

    python -m benchmarks.saving

The state (parameters, EMA, Adam: 572 MB) is copied, and written in the background; the loop goes on in between.
"""

import tempfile
import time

import jax
import numpy as np

from benchmarks.record import store
from configs import cifar10
from diffusion import experiment
from diffusion.runtime.checkpoint import Checkpoints


def main(repetitions=8):
    exp = experiment.build(cifar10.get_config())
    state = jax.block_until_ready(jax.jit(exp.init)(jax.random.key(0)))
    trees = {'params': state.params, 'ema': state.ema, 'opt_state': state.opt_state}
    stalls, writes = [], []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=1, writing=True) as checkpoints:
        checkpoints.reserve(**trees)
        time.sleep(5)  # as many steps pass before the first checkpoint
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
