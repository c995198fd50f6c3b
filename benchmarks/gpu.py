"""Compare our networks with PyTorch's on one GPU, in bfloat16; the outputs are first checked in float32.

    python -m benchmarks.gpu [--repetitions=3]

It takes less than ten minutes. DDPM is measured over 100 steps, because each of the 1000 takes the same time. Without
PyTorch and diffusers, only our side is measured.
"""

import argparse
import os
import tempfile
import time

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # the peers use the same GPU

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.peers import TASKS, Task, compare, layout_of, peer_versions, sides, summary

STEP_FLOP = 36.5e9  # per image of a training step of the CIFAR-10 network, in convolutions and matrix products


def outputs(batch: int = 16) -> dict[str, np.ndarray]:
    """Return the outputs of the CIFAR-10 network for the same images.

    Returns:
        {'float32' and 'bfloat16': ours, 'diffusers': its output in float32 if it is installed}, each (B, 32, 32, 3).
    """
    from diffusion import build

    x, t = np.random.default_rng(0).normal(size=(batch, 32, 32, 3)), np.arange(batch) * 60 + 1
    x, found = x.astype(np.float32), {}
    for dtype in ('float32', 'bfloat16'):
        config = Task('cifar10', batch, dtype=dtype).build()
        network = build.build(config).network
        leaves, treedef = jax.tree.flatten(network.init(jax.random.key(0)))
        keys = jax.random.split(jax.random.key(1), len(leaves))  # no layer stays at zero
        leaves = [p + 0.02 * jax.random.normal(key, p.shape) for p, key in zip(leaves, keys, strict=True)]
        params = jax.tree.unflatten(treedef, leaves)
        with jax.default_matmul_precision('float32' if dtype == 'float32' else 'default'):
            found[dtype] = np.asarray(jax.jit(lambda p, net=network.net: net(p)(x, jnp.asarray(t)))(params))
        if dtype == 'float32' and len(sides()) > 1:
            found['diffusers'] = diffusers_output(config, params, x, t)
    return found


def diffusers_output(config: ConfigDict, params: dict, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Return the output of diffusers' network with our parameters, (B, H, W, C)."""
    import torch
    from diffusers import UNet2DModel

    from diffusion.interop import diffusers_export

    with tempfile.TemporaryDirectory() as folder:
        diffusers_export.write(folder, jax.device_get(params), network=layout_of(config), scheduler={})
        net = UNet2DModel.from_pretrained(os.path.join(folder, 'unet'), low_cpu_mem_usage=False).eval()
    net = net.to('cuda' if torch.cuda.is_available() else 'cpu')
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        found = net(torch.from_numpy(x).permute(0, 3, 1, 2).to(net.device), torch.from_numpy(t).to(net.device)).sample
    return found.permute(0, 2, 3, 1).cpu().numpy()


def check() -> dict[str, float]:
    """Return the relative differences of the outputs from ours in float32: RMS(difference)/RMS(output).

    Raises:
        ValueError: a difference is too large.
    """
    found = outputs()
    exact = found.pop('float32')
    errors = {who: float(np.sqrt(np.mean((out - exact) ** 2) / np.mean(exact**2))) for who, out in found.items()}
    allowed = {'bfloat16': 0.05, 'diffusers': 1e-3}
    wrong = [f'{who} by {error:.2g}' for who, error in errors.items() if not error < allowed[who]]
    if wrong:
        raise ValueError(f'outputs differ from those in float32: {", ".join(wrong)}; nothing was measured')
    return errors


def matrix_rate(size: int = 8192, repetitions: int = 20) -> float:
    """Return the FLOP/s of square matrix products in bfloat16."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    b = jax.block_until_ready(product(a, a))
    started = time.perf_counter()
    for _ in range(repetitions):
        b = product(a, b)
    jax.block_until_ready(b)
    return 2 * size**3 * repetitions / (time.perf_counter() - started)


def main() -> None:
    """Check, measure, and store the figures."""
    from benchmarks import cost
    from benchmarks.record import store

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repetitions', type=int, default=3)
    repetitions = parser.parse_args().repetitions
    if jax.default_backend() != 'gpu':
        parser.exit(2, f'there is no GPU, only {jax.devices()[0].device_kind}\n')
    rates = {'differences from float32': check(), 'matrix products, FLOP/s': matrix_rate()}
    result = {}
    for task in TASKS['gpu']:
        result[task.name] = compare(task, sides(), repetitions)
        print(summary(task, result[task.name]), flush=True)
        rate = task.batch * max(task.num_steps, 1) / np.median(result[task.name]['seconds']['ours'])
        if task.num_steps:
            rates[f'{task.name}: network evaluations per second'] = rate
        else:
            rates[f'{task.name}: share of the rate of matrix products'] = (
                rate * STEP_FLOP / rates['matrix products, FLOP/s']
            )
    bound = cost.elbo_ratios('cifar10', images=500, batch=250, dtype='bfloat16')
    rates['ELBO over network evaluations alone'] = float(np.median(bound))
    store('gpu', {'rates': rates, 'tasks': result}, **peer_versions())


if __name__ == '__main__':
    main()
