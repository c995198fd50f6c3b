"""Measure Inception's features of images beside pytorch-fid's own loop, and the Fréchet distance of 2,048 values.

    python -m benchmarks.features [--images=10000]

Both sides read a folder of random pictures of 32×32 and compute the 2,048 features of each on the CPU, with random
weights of the same distribution. Each side is a process of its own, and the two run one after the other. The time
begins when the first batch is done, so that it has no compilation. Without pytorch-fid and torchvision, which its
network is made of, only our side is measured. A torchvision for GPUs will do: after `make peers`,
`PYTHONPATH=.venv-peers/torchvision .venv-peers/bin/python -m benchmarks.features` finds one.

With random weights features mean nothing, but take as long.
"""

import argparse
import glob
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

SIZE = 2048  # values of a feature vector
# Names of figures.
DISTANCE = 'Fréchet distance of 2,048 values, seconds, median'
OVER_PYTORCH_FID = "features, time over pytorch-fid's"


def ours(folder: str) -> Callable[[int], np.ndarray]:
    """Return a function that computes the features of the first images of a folder, as --mode=evaluate does."""
    from diffusion.configs import cifar10
    from diffusion.metrics import inception
    from diffusion.modes import evaluate, reference
    from diffusion.runtime import mesh

    config = cifar10.get_config()
    mesh.use_cores(config.metrics.batch_size)
    devices = mesh.make_mesh()
    params = inception.convert(random_tensors(inception.shapes()), 'random weights')
    network = reference.Network('inception', 'pytorch-fid', params, None)
    plan = evaluate.Plan([network], {}, {}, {})
    images = evaluate.open_images(folder, (32, 32, 3))
    return lambda count: evaluate.extract_all(config, plan, network, images, count, devices, ('pool3',))['pool3']


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return tensors of Inception with which activations neither vanish nor explode, as `theirs` has."""
    rng = np.random.default_rng(0)
    constants = {'running_mean': 0.0, 'bias': 0.0, 'running_var': 1.0, 'weight': 1.0}
    return {
        name: rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        if len(shape) > 1
        else np.full(shape, constants[name.rpartition('.')[2]], np.float32)
        for name, shape in shapes.items()
    }


def theirs(folder: str) -> Callable[[int], np.ndarray]:
    """Return the same for pytorch-fid."""
    import torch

    # A torchvision for GPUs cannot describe its operators to a PyTorch for CPUs. None of them is needed.
    torch.library.register_fake = lambda *_, **__: lambda function: function
    import pytorch_fid.inception
    from pytorch_fid.fid_score import get_activations

    # Random weights instead of those that it would fetch.
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: None
    torch.nn.Module.load_state_dict = lambda *_, **__: None  # type: ignore[method-assign]
    net = pytorch_fid.inception.InceptionV3()
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    files = sorted(glob.glob(os.path.join(folder, '*.png')))
    return lambda count: get_activations(files[:count], net)


SIDES = {'ours': ours, 'pytorch-fid': theirs}


def sides() -> list[str]:
    """Return the sides that can be measured here, ours first."""
    has_peer = all(importlib.util.find_spec(name) for name in ('torch', 'torchvision', 'pytorch_fid'))
    return list(SIDES) if has_peer else ['ours']


def work(side: str, folder: str, count: int) -> None:
    """Compute the features of the first images twice: of a batch, then of all. Print the seconds of the latter."""
    compute = SIDES[side](folder)
    compute(min(count, 64))
    started = time.perf_counter()
    found = compute(count)
    seconds = time.perf_counter() - started
    assert found.shape == (count, SIZE) and found.std() > 0
    print(seconds, flush=True)


def compare(count: int) -> dict[str, float]:
    """Return {side: seconds for the features of so many images}."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for number in range(count):
            picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            picture.save(os.path.join(folder, f'{number:05}.png'))
        for side in sides():
            command = [sys.executable, '-m', 'benchmarks.features', f'--side={side}', f'--folder={folder}']
            command.append(f'--images={count}')
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[side] = float(done.stdout.splitlines()[-1])
            print(f'{side}: {found[side]:.4g} s', flush=True)
    return found


def distance_seconds(repetitions: int = 3) -> list[float]:
    """Return the seconds of each repetition of the Fréchet distance between two Gaussians of 2,048 values."""
    from diffusion.metrics import frechet

    rng = np.random.default_rng(0)
    gaussians = []
    for _ in range(2):
        factor = rng.normal(0, SIZE**-0.5, (SIZE, SIZE))
        gaussians.append((rng.normal(size=SIZE), factor @ factor.T))
    found = []
    for _ in range(repetitions):
        started = time.perf_counter()
        frechet.distance(*gaussians)
        found.append(time.perf_counter() - started)
    return found


def main() -> None:
    """Measure both, and store the figures; with --side, run as one of the sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=10_000)
    parser.add_argument('--side', choices=[*SIDES], help='run as the process of one side')
    parser.add_argument('--folder', help='of the pictures, for --side')
    asked = parser.parse_args()
    if asked.side:
        work(asked.side, asked.folder, asked.images)
        return
    distances = distance_seconds()
    seconds = compare(asked.images)

    from benchmarks.record import store

    result = {
        DISTANCE: float(np.median(distances)),
        'Fréchet distance of 2,048 values, seconds, all': distances,
        'images': asked.images,
        'features, seconds': seconds,
    }
    if 'pytorch-fid' in seconds:
        result[OVER_PYTORCH_FID] = seconds['ours'] / seconds['pytorch-fid']
    packages = ('torch', 'torchvision', 'pytorch-fid') if 'pytorch-fid' in seconds else ()
    arguments = '' if asked.images == 10_000 else f' --images={asked.images}'
    store('features', result, arguments, **{name: importlib.metadata.version(name) for name in packages})


if __name__ == '__main__':
    main()
