"""Prepare a dataset as array_record files. Needs TensorFlow: `make prepare` runs it in an environment of its own.

python -m diffusion.data.prepare celeb_a --data_dir=… --manual_dir=…     downloads and prepares a TFDS dataset
python -m diffusion.data.prepare folder:/path/to/pictures --name=mine    a folder or zip file of pictures
"""

import argparse
import contextlib
import os
import sys

from diffusion.data.sources import open_source


def prepare_dataset(name, data_dir, manual_dir):
    """A dataset of the TFDS catalogue. Returns its folder."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    except tfds.core.DatasetNotFoundError as error:
        sys.exit(f'error: {error}')
    downloads = tfds.download.DownloadConfig(manual_dir=manual_dir and os.path.abspath(manual_dir))
    builder.download_and_prepare(download_config=downloads, file_format='array_record')
    return builder.data_dir


def prepare_folder(source, name, data_dir):
    """The splits of a folder or a zip file of pictures, their bytes as they are. Returns the dataset's folder."""
    import tensorflow_datasets as tfds

    splits = {'train': open_source(source, 'train')}
    with contextlib.suppress(ValueError):  # there is none
        splits['test'] = open_source(source, 'test')
    classes = splits['train'].classes
    features = {'image': tfds.features.Image()}
    if classes:
        features['label'] = tfds.features.ClassLabel(names=classes)

    def examples(pictures):
        for i in range(len(pictures)):
            try:
                content, label = pictures.read(i)
            except ValueError as error:
                print(f'warning: {pictures.names[i]!r} {error}; it is left out', flush=True)
                continue
            yield i, {'image': content} | ({'label': label} if classes else {})

    builder = tfds.dataset_builders.AdhocBuilder(
        name=name,
        version='1.0.0',
        features=tfds.features.FeaturesDict(features),
        split_datasets={split: examples(pictures) for split, pictures in splits.items()},
        data_dir=data_dir,
        file_format='array_record',
        disable_shuffling=True,
    )
    builder.download_and_prepare()
    return builder.data_dir


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'dataset', help='a name of the TFDS catalogue, as celeb_a or lsun/church_outdoor, or folder:PATH'
    )
    parser.add_argument('--data_dir', help='where to; TFDS_DATA_DIR or ~/tensorflow_datasets by default')
    parser.add_argument('--manual_dir', help='where files lie that have to be downloaded by hand')
    parser.add_argument('--name', help='what a folder of pictures is to be called')
    asked = parser.parse_args()
    data_dir = os.path.expanduser(asked.data_dir) if asked.data_dir else None
    try:
        if asked.dataset.startswith('folder:'):
            if not asked.name:
                parser.error('a folder of pictures needs a name: NAME=mine with make, --name=mine here')
            where = prepare_folder(asked.dataset, asked.name, data_dir)
        else:
            where = prepare_dataset(asked.dataset, data_dir, asked.manual_dir)
    except (ValueError, OSError, AssertionError) as error:
        sys.exit(f'error: {error}')
    name = asked.name if asked.dataset.startswith('folder:') else asked.dataset
    print(f'prepared in {where}')
    print(f'use it by --config.data.source=tfds:{name}' + (f' --config.data.data_dir={data_dir}' if data_dir else ''))


if __name__ == '__main__':
    main()
