"""Datasets that tensorflow-datasets has prepared as array_record files.

The files are read here, and not by `tfds.builder_from_directory`, which imports modules that the dataset's files name.
Reading needs neither TensorFlow nor the dataset's code.
"""

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusion.data import pictures
from diffusion.data.sources import riegeli
from diffusion.data.sources.source import LARGE, Source, one_large, unlabelled
from diffusion.data.sources.splits import named, replaced
from diffusion.util import open_regular, read_json

MOST_CLASSES = 10**6


class _Shard(NamedTuple):
    """All examples of an array_record file, as array_record's data source takes it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class _Names(Sequence):
    """The names of the examples; a data set may have billions."""

    def __init__(self, start: str, numbers: range):
        self._start, self._numbers = start, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: Any) -> Any:
        found = self._numbers[i]
        return _Names(self._start, found) if isinstance(found, range) else f'{self._start} {found}'


def open_tfds(place: str, split: str, data_dir: str = '', max_pixels: int = pictures.MAX_PIXELS) -> Source:
    """Open one split of a prepared dataset.

    Args:
        place: 'NAME', 'NAME/CONFIG' or 'NAME[/CONFIG]:VERSION'; without a version, the newest one is used.
        split: a split of the dataset; 'test' and 'validation' are also found under similar names.
        data_dir: the folder that contains the datasets; '' is $TFDS_DATA_DIR or ~/tensorflow_datasets.
        max_pixels: larger pictures cannot be read.

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
    info = _info(folder, name)
    image, classes = _features(folder, name)
    known = {entry['name']: entry for entry in info['splits']}
    found = named(split, known)
    if found is None:
        raise ValueError(f'the dataset in {folder} has no split {split!r}; it has {", ".join(known)}')
    shards, files, largest = _shards(folder, name, info['name'], known[found], max_pixels)
    examples, count = _examples(shards), sum(shard.take for shard in shards)
    counts = ', '.join(f'{entry["name"]} {sum(map(int, entry["shardLengths"]))}' for entry in info['splits'])

    # For each picture `label` is called after `read`, from several threads; the cache reads the example only once.
    @functools.lru_cache(maxsize=max(1, min(64, 4 * LARGE // (largest or 1))))
    def example(i: int) -> Any:
        try:
            with one_large if largest > LARGE else contextlib.nullcontext():
                return examples(i)
        except Exception as error:  # array_record and protobuf raise several types for damaged files
            raise ValueError(f'cannot be read ({type(error).__name__}: {str(error)[:200]})') from error

    def encoded(i: int) -> bytes:
        values = example(i)[image].bytes_list.value
        if len(values) != 1:
            raise ValueError(f'has {len(values)} values of the feature {image!r}')
        return bytes(values[0])

    def label(i: int) -> int | None:
        values = example(i)['label'].int64_list.value
        return int(values[0]) if len(values) == 1 and 0 <= values[0] < len(classes or ()) else None

    described = [name, os.path.basename(folder), found, max_pixels, [shard.take for shard in shards]]
    return Source(
        names=_Names(f'{name}, {found}, example', range(count)),
        read=lambda i: pictures.decode(encoded(i), max_pixels),
        identity=[*described, files],
        label=label if classes else unlabelled,
        classes=classes,
        encoded=encoded,
        about=[f'splits of {folder}: {counts} pictures', *replaced(split, found)],
        everywhere=[*described, [file[:2] for file in files]],
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
            '    use a folder or zip file of pictures:                 --config.data.source=folder:/path/to/pictures\n'
            f'    or prepare it (downloads, needs disk and TensorFlow): make prepare DATASET={name}{place}\n'
            '    (if it is prepared in another folder:                 --config.data.data_dir=…)'
        )
    return os.path.join(folder, found[-1])


def _versions(folder: str) -> list[str]:
    """Return the prepared versions in a dataset's folder, the oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in names if os.path.isfile(os.path.join(folder, name, 'dataset_info.json'))]
    names = [name for name in names if all(part.isdigit() for part in name.split('.'))]
    return sorted(names, key=lambda name: [int(part) for part in name.split('.')])


def _info(folder: str, name: str) -> dict[str, Any]:
    """Return the description of a dataset in array_record files: 'name' and 'splits'."""
    try:
        info = read_json(os.path.join(folder, 'dataset_info.json'))
        file_format = info.get('fileFormat')
        if file_format == 'array_record':
            if not isinstance(info['name'], str) or '/' in info['name']:
                raise ValueError(f'name is {info["name"]!r}')
            for entry in info['splits']:
                if not isinstance(entry['name'], str) or any(int(length) < 0 for length in entry['shardLengths']):
                    raise ValueError(f'a split is {str(entry)[:100]}')
            return info
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(f'the dataset in {folder}', error, name) from error
    raise ValueError(
        f'the dataset in {folder} has {file_format} files, which only TensorFlow can read\n'
        f'    prepare it as array_record files:  make prepare DATASET={name} DATA_DIR=/another/place'
    )


def _features(folder: str, name: str) -> tuple[str, list[str] | None]:
    """Return the key of the image feature, and the names of the labels."""
    try:
        features = read_json(os.path.join(folder, 'features.json'))['featuresDict']['features']
        # The class of each feature is only compared, never imported.
        kinds = {key: feature['pythonClassName'].rpartition('.')[2] for key, feature in features.items()}
        classes = _classes(folder, features['label']) if kinds.get('label') == 'ClassLabel' else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(f'the dataset in {folder}', error, name) from error
    images = [key for key, kind in kinds.items() if kind == 'Image']
    if not images:
        raise ValueError(f'the dataset in {folder} has no images: its features are {", ".join(features)}')
    image = 'image' if 'image' in images else images[0]
    if features[image].get('image', {}).get('dtype') == 'float32':  # TFDS stores the four bytes of each as a colour
        raise ValueError(
            f'the dataset in {folder} has floating-point values in the feature {image!r}, whose range is unknown: '
            'convert them to 8 or 16 bits, as a folder of pictures'
        )
    return image, classes


def _classes(folder: str, feature: dict[str, Any]) -> list[str]:
    """Return the names of the labels: those of the file, or numbers."""
    path = os.path.join(folder, 'label.labels.txt')
    if os.path.exists(path):
        with open_regular(path) as file:
            return [line.strip() for line in file if line.strip()]
    count = int(feature['classLabel']['numClasses'])
    if count > MOST_CLASSES:
        raise ValueError(f'{count} classes are more than {MOST_CLASSES}')
    return [str(i) for i in range(count)]


def _shards(
    folder: str, name: str, prefix: str, split: dict[str, Any], max_pixels: int
) -> tuple[list[_Shard], list[list], int]:
    """Return the files of a split; [name, size, time of modification] of each; and the size of the largest chunk."""
    shards, files, largest = [], [], 0
    most = pictures.most_bytes(max_pixels) + LARGE  # a picture, and the other features and examples of a chunk
    lengths = [int(length) for length in split['shardLengths']]
    try:
        for i, length in enumerate(lengths):
            file = f'{prefix}-{split["name"]}.array_record-{i:05d}-of-{len(lengths):05d}'
            path = os.path.join(folder, file)
            status = os.stat(path)
            if not os.path.isfile(path):
                raise ValueError(f'{file} is not a file')
            if length > status.st_size:  # an example takes at least a byte
                raise ValueError(f'{file} has {status.st_size} bytes, too few for {length} examples')
            if length:
                largest = max(largest, riegeli.largest_chunk(path, most))
            shards.append(_Shard(path, 0, length, length))
            files.append([file, status.st_size, status.st_mtime_ns])
    except (OSError, ValueError) as error:
        raise _damaged(f'split {split["name"]!r} of the dataset in {folder}', error, name) from error
    return shards, files, largest


def _examples(shards: list[_Shard]) -> Any:
    """Return a function that maps the number of an example to its features."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from tensorflow_datasets.proto import tf_example_pb2  # slow to import

    records = ArrayRecordDataSource([shard for shard in shards if shard.take])
    return lambda i: tf_example_pb2.Example.FromString(records[i]).features.feature


def _damaged(what: str, error: Exception, name: str) -> ValueError:
    return ValueError(
        f'{what} cannot be read ({type(error).__name__}: {str(error)[:200]})\n'
        f'    remove that folder and prepare it again:  make prepare DATASET={name}'
    )
