"""Datasets that tensorflow-datasets has prepared as array_record files; reading them needs no TensorFlow."""

import functools
import os
from typing import Any

from diffusion.data import pictures
from diffusion.data.sources.source import Source, unlabelled
from diffusion.data.sources.splits import SPLIT_NAMES


def open_tfds(place: str, split: str, data_dir: str = '') -> Source:
    """Open one split of a prepared dataset.

    Args:
        place: 'NAME', 'NAME/CONFIG' or 'NAME[/CONFIG]:VERSION'; without a version, the newest one is used.
        split: a split of the dataset; 'test' and 'validation' are also found under similar names.
        data_dir: the folder that contains the datasets; '' is $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
        The pictures of the split.

    Raises:
        ValueError: the dataset is not prepared, is damaged, needs TensorFlow, or lacks the split or images.
    """
    if not place:
        raise ValueError(
            "source 'tfds' needs the name of a dataset: --config.data.source=tfds:NAME; "
            'to use your own pictures: --config.data.source=folder:/path/to/pictures'
        )
    name, _, version = place.partition(':')
    folder = _find(name, version, data_dir)
    builder = _builder(folder, name)
    image, classes = _features(builder, folder)
    split = _split_name(builder, split, folder)
    examples, files = _examples(builder, split, folder, name)

    # `label` follows `read` for each picture, from several threads; the example is read only once.
    @functools.lru_cache(maxsize=64)
    def example(i: int) -> Any:
        try:
            return examples[i]
        except Exception as error:  # array_record and protobuf raise several types for damaged files
            raise ValueError(f'cannot be read ({type(error).__name__}: {str(error)[:200]})') from error

    def encoded(i: int) -> bytes:
        return bytes(example(i)[image])

    info, version = builder.info.splits[split], os.path.basename(folder)
    return Source(
        names=[f'{name}, {split}, example {i}' for i in range(len(examples))],
        read=lambda i: pictures.decode(encoded(i)),
        identity=[name, version, split, len(examples), list(info.shard_lengths), info.num_bytes, files],
        label=(lambda i: int(example(i)['label'])) if classes else unlabelled,
        classes=classes,
        encoded=encoded,
    )


def _find(name: str, version: str, data_dir: str) -> str:
    """Return the folder of a version of a dataset."""
    root = os.path.expanduser(data_dir or os.environ.get('TFDS_DATA_DIR') or os.path.join('~', 'tensorflow_datasets'))
    folder = os.path.join(root, name)
    found = [prepared for prepared in _versions(folder) if not version or prepared == version]
    if not found:
        place = f' DATA_DIR={data_dir}' if data_dir else ''
        raise ValueError(
            f'there is no dataset {name}{":" * bool(version)}{version} prepared in {folder}\n'
            f'    prepare it (downloads it, needs disk):  make prepare DATASET={name}{place}\n'
            '    or use a folder of pictures:            --config.data.source=folder:/path/to/pictures\n'
            '    (if it is in another folder:            --config.data.data_dir=…)'
        )
    return os.path.join(folder, found[-1])


def _versions(folder: str) -> list[str]:
    """Return the prepared versions in a dataset's folder, the oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in names if os.path.isfile(os.path.join(folder, name, 'dataset_info.json'))]
    names = [name for name in names if all(part.isdigit() for part in name.split('.'))]
    return sorted(names, key=lambda name: [int(part) for part in name.split('.')])


def _builder(folder: str, name: str) -> Any:
    """Return the TFDS builder of a prepared dataset in array_record files."""
    import tensorflow_datasets as tfds  # slow to import

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # the parsers of its JSON files raise several types
        raise ValueError(
            f'the dataset in {folder} cannot be read ({type(error).__name__}: {str(error)[:200]})\n'
            f'    remove that folder and prepare it again:  make prepare DATASET={name}'
        ) from error
    file_format = builder.info.file_format and builder.info.file_format.value
    if file_format != 'array_record':
        raise ValueError(
            f'the dataset in {folder} has {file_format} files, which only TensorFlow can read\n'
            f'    prepare it as array_record files:  make prepare DATASET={name} DATA_DIR=/another/place'
        )
    return builder


def _features(builder: Any, folder: str) -> tuple[str, list[str] | None]:
    """Return the key of the image feature, and the names of the labels."""
    import tensorflow_datasets as tfds

    features, images = builder.info.features, _image_keys(builder)
    if not images:
        raise ValueError(f'the dataset in {folder} has no images: its features are {", ".join(features)}')
    labelled = 'label' in features and isinstance(features['label'], tfds.features.ClassLabel)
    return 'image' if 'image' in images else images[0], list(features['label'].names) if labelled else None


def _image_keys(builder: Any) -> list[str]:
    import tensorflow_datasets as tfds

    return [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]


def _split_name(builder: Any, split: str, folder: str) -> str:
    """Return the dataset's own name for a split."""
    for name in SPLIT_NAMES.get(split, (split,)):
        if name in builder.info.splits:
            return name
    raise ValueError(f'the dataset in {folder} has no split {split!r}; it has {", ".join(builder.info.splits)}')


def _examples(builder: Any, split: str, folder: str, name: str) -> tuple[Any, list]:
    """Return the examples of a split, with encoded images, and (name, size, time) of its files."""
    import tensorflow_datasets as tfds

    try:
        decoders = {key: tfds.decode.SkipDecoding() for key in _image_keys(builder)}
        examples = builder.as_data_source(split=split, decoders=decoders)
        len(examples)  # opens the files
        files, shards = _files(folder, split), len(builder.info.splits[split].shard_lengths)
        if len(files) != shards:
            raise ValueError(f'there are {len(files)} array_record files instead of {shards}')
    except Exception as error:  # a missing or truncated file
        raise ValueError(
            f'split {split!r} of the dataset in {folder} cannot be read ({type(error).__name__}: {str(error)[:200]})\n'
            f'    remove that folder and prepare it again:  make prepare DATASET={name}'
        ) from error
    return examples, files


def _files(folder: str, split: str) -> list[list]:
    """Return [name, size, time of modification] of each file of a split."""
    names = sorted(name for name in os.listdir(folder) if f'-{split}.array_record' in name)
    status = [os.stat(os.path.join(folder, name)) for name in names]
    return [[name, s.st_size, s.st_mtime_ns] for name, s in zip(names, status, strict=True)]
