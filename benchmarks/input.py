"""Measure the throughput of the input pipeline, and how long training waits for it.

    python -m benchmarks.input [--source=folder:PATH] [--image_size=32]

It reports images/s decoded from files, gathered from the cache, and gathered on the device. For comparison, the loaders
of Grain and (if installed) PyTorch decode the same files with Pillow. It also reports the fraction of training time,
with the digits' network, that is spent waiting for the next batch. Without --source, it uses synthetic JPEGs.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import os
import tempfile
import time

import grain
import jax
import numpy as np
from PIL import Image

from benchmarks.record import store
from diffusion import build, data
from diffusion.configs import digits
from diffusion.data.sources import open_source
from diffusion.modes import train

BATCH = 128
PEER_IMAGES = 12_800  # decoded by each of the other loaders


def synthetic(folder, count=10_000, size=32):
    """Write smooth coloured JPEGs to a folder, and return the source."""
    random = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(os.path.join(folder, f'{i:05d}.jpg'), quality=90)
    return f'folder:{folder}'


def rate(batches, count):
    """Return the images/s of the first `count` images, after a warm-up batch."""
    next(batches)
    start, seen = time.perf_counter(), 0
    while seen < count:
        seen += len(next(batches))
    return seen / (time.perf_counter() - start)


def decode_with_pillow(encoded, image_size, i):
    """Decode and resize a picture in the usual way."""
    with Image.open(io.BytesIO(encoded(i))) as image:
        return np.asarray(image.convert('RGB').resize((image_size, image_size), Image.Resampling.LANCZOS))


def grain_loader(pictures, image_size):
    """Return Grain's shuffled batches, decoded in its threads."""
    numbers = grain.MapDataset.source(range(len(pictures))).shuffle(seed=0).repeat()
    decoded = numbers.map(functools.partial(decode_with_pillow, pictures.encoded, image_size))
    threads = grain.ReadOptions(num_threads=2 * os.cpu_count(), prefetch_buffer_size=4 * BATCH)
    return iter(decoded.to_iter_dataset(threads).batch(BATCH))


def torch_loader(pictures, image_size):
    """Return PyTorch's shuffled batches, decoded in one process per core."""
    import torch

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(pictures)

        def __getitem__(self, i):
            return torch.from_numpy(decode_with_pillow(pictures.encoded, image_size, i).copy())

    loader = torch.utils.data.DataLoader(Pictures(), BATCH, shuffle=True, num_workers=os.cpu_count(), drop_last=True)
    return iter(loader)


def on_device(images, steps):
    """Return the images/s of a compiled gather on the device, to which the indices are sent at each step."""
    whole, order = jax.device_put(images.images[:]), data.Order(len(images), BATCH, 0)
    gather = jax.jit(lambda whole, indices: whole[indices])
    jax.block_until_ready(gather(whole, order[0]))
    start = time.perf_counter()
    for step in range(steps):
        batch = gather(whole, order[step])
    jax.block_until_ready(batch)
    return steps * BATCH / (time.perf_counter() - start)


def waiting(images, placement, *, segments=8, steps=100):
    """Return the fraction of training time that is spent waiting for batches.

    Segments of steps that are fed as in training alternate with segments of the same steps on one batch that is already
    on the device; the medians are compared. The fraction of the time that the host spends in next(batches), while the
    device may be busy, is returned as well.
    """
    config = digits.get_config()
    config.data.placement = placement
    config.train.num_steps = 10**6
    exp = build.build(config)
    state = exp.packed(exp.initial_state(jax.random.key(0)))
    batches = train.feed(config, exp, images, 0)
    first = next(batches)
    step_fn = train.compile_step(config, exp, state, *first)

    def segment(batches):
        """Return (seconds, seconds in next(batches)) per step."""
        nonlocal state
        jax.block_until_ready(state)
        begun, inside, pending, batch = time.perf_counter(), 0.0, None, next(batches)
        for _ in range(steps):
            state, metrics = step_fn(state, *batch)
            before = time.perf_counter()
            batch = next(batches)
            inside += time.perf_counter() - before
            if pending:
                jax.device_get(pending)
            pending = metrics
        jax.block_until_ready(state)
        return (time.perf_counter() - begun) / steps, inside / steps

    segment(batches)
    turns = [(segment(batches), segment(itertools.repeat(first))) for _ in range(segments)]
    fed, inside, ready = np.median([(*fed, ready[0]) for fed, ready in turns], axis=0)
    return {
        'share lost against a batch that is there': float(np.median([1 - r[0] / f[0] for f, r in turns])),
        'share of the host in next(batches)': float(inside / fed),
        'milliseconds a step': 1000 * float(fed),
        'milliseconds a step, with a batch that is there': 1000 * float(ready),
    }


def main():
    """Run the benchmark, and store its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--source', help='folder:PATH or tfds:NAME; by default, synthetic pictures')
    parser.add_argument('--image_size', type=int, default=32)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        source = asked.source or synthetic(place)
        load = functools.partial(
            data.load, source, image_size=asked.image_size, channels=3, crop='center', cache_dir=f'{place}/cache'
        )
        pictures = open_source(source, 'train')
        peers = {'Grain, decoding by Pillow in threads': rate(grain_loader(pictures, asked.image_size), PEER_IMAGES)}
        if importlib.util.find_spec('torch'):
            count = min(PEER_IMAGES, len(pictures) - 2 * BATCH)
            peers['PyTorch, decoding by Pillow in processes'] = rate(torch_loader(pictures, asked.image_size), count)
        begun = time.perf_counter()
        images = load()
        cold = len(images) / (time.perf_counter() - begun)
        order, steps = data.Order(len(images), BATCH, 0), 2000
        small = load(image_size=8, channels=1)
        result = {
            'images': len(images),
            'image size': asked.image_size,
            'images/s': {
                'from files into the cache': cold,
                'from files, not cached': rate(
                    data.prefetch(load(cache=False), order, 0, PEER_IMAGES // BATCH + 1), PEER_IMAGES
                ),
                'from the cache': rate(data.prefetch(images, order, 0, steps + 1), steps * BATCH),
                'on the device': on_device(images, steps),
                **peers,
            },
            'waiting for data, digits network at 8×8': {
                'device': waiting(small, 'device'),
                'host': waiting(small, 'host'),
            },
        }
    arguments = ' --source=folder:PATH' if asked.source else ''
    store('input', result, arguments, grain=importlib.metadata.version('grain'))


if __name__ == '__main__':
    main()
