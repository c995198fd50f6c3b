"""--mode=data: what the network will see, before a week of training on it."""

import os

import jax
import numpy as np

from diffusion import data, experiment, train
from diffusion.data.pictures import Preprocessing
from diffusion.report.grid import save_grid
from diffusion.runtime.files import write_json


def run(config, workdir):
    """Write data/grid.png and data/record.json from a sample of the training images. Returns the exit status."""
    config = experiment.resolve(config, workdir)
    asked = config.data
    how = dict(image_size=asked.image_size, channels=asked.channels, crop=asked.crop)
    with experiment.naming('config.data'):
        seen = data.survey(asked.source, data_dir=asked.data_dir, **how)
    sizes = ', '.join(f'{width}×{height}' for (height, width), _ in seen.sizes.most_common(5))
    print(f'{seen.count} pictures in {asked.source}; of {seen.seen} looked at, {seen.grey} are grey;')
    print(f'{len(seen.sizes)} sizes: {sizes}{" …" * (len(seen.sizes) > 5)}')
    if seen.bad:
        share = len(seen.bad) / seen.seen
        refused = ', which training refuses' if share > asked.max_bad_fraction else ''
        print(f'{len(seen.bad)} of them cannot be used ({share:.1%}{refused}), of which the first:')
    for name, reason in seen.bad[:5]:
        print(f'    {name!r} {reason}')
    if seen.images is None:
        raise experiment.RunError(f'config.data: none of the {seen.seen} pictures looked at can be used')

    folder = experiment.make_folder(workdir, 'data')
    chosen = data.Order(len(seen.images), min(100, len(seen.images)), config.seed)[0]
    shown = train.show(jax.random.key(config.seed), seen.images[chosen], flip=asked.flip)
    with experiment.writing(folder):
        save_grid(os.path.join(folder, 'grid.png'), data.to_uint8(shown))
    floats = data.to_float(seen.images)
    record = {
        'source': asked.source,
        'count': seen.count,
        'looked_at': seen.seen,
        'bad': len(seen.bad),
        'channel_means': floats.mean(axis=(0, 1, 2), dtype=np.float64).tolist(),
        'channel_stds': floats.std(axis=(0, 1, 2), dtype=np.float64).tolist(),
        'shape': list(seen.images.shape[1:]),
        'flip': asked.flip,
        'preprocessing': None,
        'fingerprint': 'digits',
    }
    if asked.source != 'digits':
        preprocess = Preprocessing(**how)
        record |= {'preprocessing': preprocess.record(), 'fingerprint': preprocess.fingerprint()}
        print(f'preprocessing {preprocess.fingerprint()}: {preprocess.record()}')
    means = ', '.join(
        f'{mean:.3f} ± {std:.3f}'
        for mean, std in zip(*(record[f'channel_{k}'] for k in ('means', 'stds')), strict=True)
    )
    print(f'images of shape {record["shape"]}; channels, mean ± standard deviation in [−1, 1]: {means}')
    with experiment.writing(folder):
        write_json(os.path.join(folder, 'record.json'), record)
    for file in ('grid.png', 'record.json'):
        print(os.path.join(folder, file))
    return 0
