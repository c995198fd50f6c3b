"""Prepare a dataset as array_record files. This needs TensorFlow: `make prepare` runs it in its own environment.

python -m diffusion.data.prepare celeb_a --data_dir=… --manual_dir=…     download and prepare a TFDS dataset
python -m diffusion.data.prepare folder:/path/to/pictures --name=mine    convert a folder or zip file of pictures
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from diffusion.data.sources import Source, open_source
from diffusion.util import say


def prepare_dataset(name: str, data_dir: str | None, manual_dir: str | None) -> str:
    """Download and prepare a dataset of the TFDS catalogue.

    Args:
        name: 'NAME' or 'NAME/CONFIG'.
        data_dir: the folder of all datasets; None is TFDS's default.
        manual_dir: the folder of files that must be downloaded by hand.

    Returns:
        The folder of the dataset.

    Raises:
        ValueError: there is no such dataset.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(str(error)) from error
    downloads = tfds.download.DownloadConfig(manual_dir=manual_dir and os.path.abspath(manual_dir))
    builder.download_and_prepare(download_config=downloads, file_format='array_record')
    return builder.data_dir


def prepare_folder(source: str, name: str, data_dir: str | None) -> str:
    """Convert the splits of a folder or zip file of pictures; the bytes of the pictures are kept.

    Args:
        source: 'folder:PATH'.
        name: the name of the new dataset.
        data_dir: the folder of all datasets; None is TFDS's default.

    Returns:
        The folder of the dataset.

    Raises:
        ValueError: there are no such pictures.
    """
    import tensorflow_datasets as tfds

    splits = {'train': open_source(source, 'train')}
    for line in splits['train'].about:
        say(line)
    with contextlib.suppress(ValueError):  # without a test split
        splits['test'] = open_source(source, 'test')
    classes = splits['train'].classes
    features = {'image': tfds.features.Image()}
    if classes:
        features['label'] = tfds.features.ClassLabel(names=classes)
    builder = tfds.dataset_builders.AdhocBuilder(
        name=name,
        version='1.0.0',
        features=tfds.features.FeaturesDict(features),
        split_datasets={split: _examples(pictures, bool(classes)) for split, pictures in splits.items()},
        data_dir=data_dir,
        file_format='array_record',
        disable_shuffling=True,
    )
    builder.download_and_prepare()
    return builder.data_dir


def _examples(pictures: Source, labelled: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Generate (key, example) of each readable picture. The label of one without a class is −1, as TFDS has it."""
    assert pictures.encoded is not None  # a folder has files
    for i, name in enumerate(pictures.names):
        try:
            example = {'image': pictures.encoded(i)}
        except ValueError as error:
            say(f'warning: {name!r} {error}; it is left out')
            continue
        label = pictures.label(i) if pictures.classes else None
        yield i, example | ({'label': -1 if label is None else label} if labelled else {})


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dataset', help='a name in the TFDS catalogue, such as lsun/church_outdoor, or folder:PATH')
    parser.add_argument(
        '--data_dir', help='the folder of all datasets; by default $TFDS_DATA_DIR or ~/tensorflow_datasets'
    )
    parser.add_argument('--manual_dir', help='the folder of files that must be downloaded by hand')
    parser.add_argument('--name', help='the name of the dataset that a folder of pictures becomes')
    args = parser.parse_args()
    data_dir = os.path.expanduser(args.data_dir) if args.data_dir else None
    is_folder = args.dataset.startswith('folder:')
    if is_folder and not args.name:
        parser.error('a folder of pictures needs a name: NAME=mine for make, --name=mine here')
    try:
        if is_folder:
            folder = prepare_folder(args.dataset, args.name, data_dir)
        else:
            folder = prepare_dataset(args.dataset, data_dir, args.manual_dir)
    except (ValueError, OSError, AssertionError) as error:
        sys.exit(f'error: {error}')
    say(f'prepared in {folder}')
    name = args.name if is_folder else args.dataset
    say(f'use it by --config.data.source=tfds:{name}' + (f' --config.data.data_dir={data_dir}' if data_dir else ''))


if __name__ == '__main__':
    main()
