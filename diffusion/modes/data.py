"""--mode=data: what the network will see, before a week of training on it."""

import os

import numpy as np
from ml_collections import ConfigDict

from diffusion import data, workdir
from diffusion.data.pictures import Preprocessing
from diffusion.modes.train import augment
from diffusion.report.grid import save_grid
from diffusion.runtime.keys import domain_key
from diffusion.util import RunError, naming, say, write_json


def run(config: ConfigDict, path: str) -> int:
    """Write data/grid.png and data/record.json from a sample of the training images.

    Args:
        config: the config of the command.
        path: the workdir.

    Returns:
        The exit status, 0.

    Raises:
        RunError: there are no pictures, none can be used, or the folder cannot be written.
    """
    # Resolve.
    config = workdir.resolve(config, path)
    asked = config.data
    preprocess = Preprocessing(asked.crop, asked.image_size, asked.channels)

    # Compute.
    with naming('config.data'):
        seen = data.survey(
            asked.source,
            asked.split,
            data_dir=asked.data_dir,
            max_pixels=asked.max_pixels,
            image_size=asked.image_size,
            channels=asked.channels,
            crop=asked.crop,
        )
    describe(seen, asked)
    if seen.images is None:
        raise RunError(f'config.data: none of {seen.seen} pictures can be used')
    chosen = data.Order(len(seen.images), min(100, len(seen.images)), config.seed)[0]
    shown = augment(domain_key(config.seed, 'flips'), seen.images[chosen], flip=asked.flip)
    floats = data.to_float(seen.images)
    means, stds = (f(axis=(0, 1, 2), dtype=np.float64).tolist() for f in (floats.mean, floats.std))

    # Record.
    record = {
        'source': asked.source,
        'split': asked.split,
        'about': list(seen.about),
        'count': seen.count,
        'looked_at': seen.seen,
        'bad': len(seen.bad),
        'channel_means': means,
        'channel_stds': stds,
        'shape': list(seen.images.shape[1:]),
        'flip': asked.flip,
        'preprocessing': preprocess.record(),
        'fingerprint': preprocess.fingerprint(),
    }
    folder = workdir.make_folder(path, 'data')
    with workdir.writing(folder):
        save_grid(os.path.join(folder, 'grid.png'), data.to_uint8(shown))
        write_json(os.path.join(folder, 'record.json'), record)

    # Report.
    say(f'preprocessing {preprocess.fingerprint()}: {preprocess.record()}')
    moments = ', '.join(f'{mean:.3f} ± {std:.3f}' for mean, std in zip(means, stds, strict=True))
    say(f'images of shape {record["shape"]}; mean ± standard deviation of each channel in [−1, 1]: {moments}')
    for file in ('grid.png', 'record.json'):
        say(os.path.join(folder, file))
    return 0


def describe(seen: data.Survey, asked: ConfigDict) -> None:
    """Print what the pictures are like before preprocessing, and which cannot be used."""
    for line in seen.about:
        say(line)
    sizes = ', '.join(f'{width}×{height}' for (height, width), _ in seen.sizes.most_common(5))
    say(f'{seen.count} pictures in {asked.source}; {seen.seen} were examined: {seen.grey} are grey')
    say(f'{len(seen.sizes)} sizes: {sizes}{" …" * (len(seen.sizes) > 5)}')
    if seen.bad:
        share = len(seen.bad) / seen.seen
        refused = ', so training will refuse them' if share > asked.max_bad_fraction else ''
        say(f'{len(seen.bad)} of them cannot be used ({share:.1%}{refused}). The first:')
        for name, reason in seen.bad[:5]:
            say(f'    {name!r} {reason}')
