"""--mode=data: what the network will see, before a week of training on it."""

import os

import numpy as np
from jaxtyping import Float64, UInt8
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
    means, stds = (values.tolist() for values in moments(seen.images))

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
    channels = ', '.join(f'{mean:.3f} ± {std:.3f}' for mean, std in zip(means, stds, strict=True))
    say(f'images of shape {record["shape"]}; mean ± standard deviation of each channel in [−1, 1]: {channels}')
    for file in ('grid.png', 'record.json'):
        say(os.path.join(folder, file))
    return 0


def moments(images: UInt8[np.ndarray, 'N H W C']) -> tuple[Float64[np.ndarray, 'C'], Float64[np.ndarray, 'C']]:
    """Return the mean and the standard deviation of each channel in [−1, 1], from counts of the 256 values."""
    counts = np.zeros((images.shape[-1], 256))
    for image in images:
        for channel, values in zip(counts, np.moveaxis(image, -1, 0), strict=True):
            channel += np.bincount(values.ravel(), minlength=256)
    levels = data.to_float(np.arange(256, dtype=np.uint8)).astype(np.float64)
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ levels
    return mean, np.sqrt(np.sum(weights * (levels - mean[:, None]) ** 2, axis=1))


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
