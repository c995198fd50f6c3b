"""Where pictures lie: below a folder, in a zip file, or in a dataset that tensorflow-datasets has prepared."""

import dataclasses
import functools
import json
import os
import stat
import zipfile
from collections.abc import Callable, Sequence

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.ppm', '.pgm', '.jp2')
# What a folder or a dataset may call its splits.
ALIASES = {'test': ('test', 'val', 'valid', 'validation'), 'validation': ('validation', 'valid', 'val')}


@dataclasses.dataclass(frozen=True)
class Source:
    """The pictures of one split, undecoded."""

    names: Sequence[str]  # of each picture, for messages
    read: Callable  # i → (bytes, label or None)
    classes: list | None  # names of the labels
    identity: list  # JSON that changes whenever the pictures may have

    def __len__(self):
        return len(self.names)


def open_source(source, split, data_dir=''):
    """The Source that 'folder:PATH' or 'tfds:NAME' stands for.

    Raises ValueError, which says what was looked for, where, and how to get it.
    """
    kind, _, where = source.partition(':')
    if kind not in SOURCES or not where:
        raise ValueError(
            f"source is {source!r}, but must be 'digits', 'folder:PATH' (or a zip file), or 'tfds:NAME': "
            'say where your pictures are by --config.data.source=folder:/path/to/pictures'
        )
    return SOURCES[kind](where, split, data_dir)


def folder(path, split, data_dir=''):
    """All pictures below a folder or in a zip file, by suffix; links are followed, each folder once.

    Where there are folders train/, test/ … they are the splits; otherwise all is the split 'train'. Where
    all pictures lie in subfolders, the first of them is the class.
    """
    path = os.path.abspath(os.path.join(os.path.expanduser(data_dir), os.path.expanduser(path)))
    if not os.path.exists(path):
        raise ValueError(
            f'there is no folder or zip file {path}\n'
            '    unpack the pictures there, or point at yours:  --config.data.source=folder:/path/to/pictures'
        )
    if os.path.isdir(path):
        files, read = _walk(path), functools.partial(_read_file, path)
    elif zipfile.is_zipfile(path):
        try:
            archive = zipfile.ZipFile(path)  # stays open as long as the source; nothing is unpacked
        except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
            raise ValueError(f'the zip file {path} is damaged ({error}): fetch or make it again') from error
        files = [(i.filename, i.file_size, i.CRC) for i in archive.infolist() if _is_picture(i.filename)]
        read = functools.partial(_read_member, archive)
    else:
        raise ValueError(
            f'{path} is neither a folder nor a whole zip file\n'
            '    point at the folder that the pictures are in:  --config.data.source=folder:/path/to/pictures'
        )
    if not files:
        raise ValueError(f'there are no pictures below {path} (by suffix: {" ".join(SUFFIXES)})')
    roots = _roots(files)
    if split not in roots:
        raise ValueError(_no_split(split, path, roots))
    below = {file: next((r for r in set(roots.values()) if file[0].startswith(r)), None) for file in files}
    parts = {file: file[0][len(root) :].split('/') for file, root in below.items() if root is not None}
    chosen = sorted(file for file, root in below.items() if root == roots[split])
    classes = None
    if all(len(part) > 1 for part in parts.values()):
        classes = sorted({part[0] for part in parts.values()})
    elif any(len(part) > 1 for part in parts.values()):
        alone = sum(len(part) == 1 for part in parts.values())
        print(f'no labels: {alone} of {len(parts)} pictures in {path} lie in no class folder', flush=True)
    number = {name: i for i, name in enumerate(classes or ())}
    labels = [number.get(parts[file][0]) for file in chosen]
    names = [name for name, *_ in chosen]
    return Source(names, lambda i: (read(names[i]), labels[i]), classes, [list(file) for file in chosen])


def _roots(files):
    """{split: the folder, ending in /, that its files lie below}; '' for all. Splits may lie in one outer folder."""
    tops = {name.partition('/')[0] if '/' in name else '' for name, *_ in files}
    outer = f'{next(iter(tops))}/' if len(tops) == 1 and tops.isdisjoint({'', 'train', *ALIASES['test']}) else ''
    found = {name[len(outer) :].partition('/')[0] for name, *_ in files}
    roots = {'train': f'{outer}train/'} if 'train' in found else {}
    for split, aliases in ALIASES.items():
        there = [alias for alias in aliases if alias in found]
        if there:
            roots[split] = f'{outer}{there[0]}/'
    return roots or {'train': outer}


def _no_split(split, path, roots):
    if list(roots) == ['train']:
        return (
            f"there is no folder {split}/ in {path}: all its pictures are the split 'train'; "
            f"put those held out into {split}/ and the others into train/, or ask for the split 'train'"
        )
    return f'there is no split {split!r} in {path}, which has {", ".join(roots)}'


def _is_picture(name):
    return name.lower().endswith(SUFFIXES) and not any(map(_is_hidden, name.split('/')))


def _is_hidden(part):
    return part == '__MACOSX' or (part.startswith('.') and part not in ('.', '..'))


def _tell(error):
    print(f'warning: the folder {error.filename!r} cannot be read ({error.strerror}): its pictures are left out')


def _walk(root):
    """(path below root, size, time of change) of each picture."""
    files, seen = [], set()
    for parent, folders, names in os.walk(root, followlinks=True, onerror=_tell):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        place = os.path.realpath(parent)
        if place in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(place)
        below = os.path.relpath(parent, root)
        for name in names:
            name = name if below == '.' else os.path.join(below, name)
            if _is_picture(name):
                try:
                    status = os.stat(os.path.join(root, name))
                    if stat.S_ISREG(status.st_mode):
                        files.append((name, status.st_size, status.st_mtime_ns))
                except OSError:  # a link to nothing: reading it will say so
                    files.append((name, -1, 0))
    return files


def _read_file(root, name):
    try:
        with open(os.path.join(root, name), 'rb') as file:
            return file.read()
    except OSError as error:
        raise ValueError(f'cannot be read ({error.strerror})') from error


def _read_member(archive, name):
    try:
        return archive.read(name)
    except Exception as error:  # zipfile's and zlib's: damaged, encrypted, or of an unknown method
        raise ValueError(f'cannot be read from the zip file ({type(error).__name__}: {error})') from error


def tfds(name, split, data_dir=''):
    """A dataset that tensorflow-datasets has prepared as array_record files; read without TensorFlow.

    name: 'NAME', 'NAME/CONFIG' or 'NAME[/CONFIG]:VERSION'; without a version, the newest there is.
    """
    name, _, version = name.partition(':')
    root = os.path.expanduser(data_dir or os.environ.get('TFDS_DATA_DIR') or os.path.join('~', 'tensorflow_datasets'))
    folder = os.path.join(root, name)
    found = [v for v in _versions(folder) if not version or v == version]
    if not found:
        place = f' DATA_DIR={data_dir}' if data_dir else ''
        raise ValueError(
            f'there is no dataset {name}{":" * bool(version)}{version} prepared in {folder}\n'
            f'    prepare it (downloads it, needs disk):  make prepare DATASET={name}{place}\n'
            '    or point at the pictures themselves:    --config.data.source=folder:/path/to/pictures\n'
            '    (another place: --config.data.data_dir=…)'
        )
    folder = os.path.join(folder, found[-1])
    import tensorflow_datasets as tfds_library

    try:
        builder = tfds_library.builder_from_directory(folder)
    except Exception as error:  # whatever the parsers of its JSON files raise
        raise ValueError(
            f'the dataset in {folder} cannot be read ({type(error).__name__}: {str(error)[:200]})\n'
            f'    remove that folder and prepare it again:  make prepare DATASET={name}'
        ) from error
    if builder.info.file_format is None or builder.info.file_format.value != 'array_record':
        raise ValueError(
            f'the dataset in {folder} has {builder.info.file_format and builder.info.file_format.value} files, '
            f'which need TensorFlow to be read\n'
            f'    prepare it as array_record files:  make prepare DATASET={name} DATA_DIR=/another/place'
        )
    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds_library.features.Image)]
    if not images:
        raise ValueError(f'the dataset in {folder} has no images: its features are {", ".join(features)}')
    image = 'image' if 'image' in images else images[0]
    labelled = 'label' in features and isinstance(features['label'], tfds_library.features.ClassLabel)
    for alias in ALIASES.get(split, (split,)):
        if alias in builder.info.splits:
            break
    else:
        raise ValueError(f'the dataset in {folder} has no split {split!r}; it has {", ".join(builder.info.splits)}')
    try:
        examples = builder.as_data_source(
            split=alias,
            decoders={key: tfds_library.decode.SkipDecoding() for key in images},
        )
        count, info, files = len(examples), builder.info.splits[alias], _files_of(folder, alias)
        if len(files) != len(info.shard_lengths):
            raise ValueError(f'it has {len(files)} array_record files of {len(info.shard_lengths)}')
    except Exception as error:  # a file that is missing or cut off
        raise ValueError(
            f'split {alias!r} of the dataset in {folder} cannot be read ({type(error).__name__}: {str(error)[:200]})\n'
            f'    remove that folder and prepare it again:  make prepare DATASET={name}'
        ) from error

    def read(i):
        try:
            example = examples[i]
        except Exception as error:  # array_record's and protobuf's: a damaged file
            raise ValueError(f'cannot be read ({type(error).__name__}: {str(error)[:200]})') from error
        return bytes(example[image]), int(example['label']) if labelled else None

    return Source(
        [f'{name}, {alias}, example {i}' for i in range(count)],
        read,
        list(features['label'].names) if labelled else None,
        [name, found[-1], alias, count, list(info.shard_lengths), info.num_bytes, files],
    )


def _files_of(folder, split):
    """(name, size, time of change) of each file of one split."""
    names = sorted(name for name in os.listdir(folder) if f'-{split}.array_record' in name)
    status = [os.stat(os.path.join(folder, name)) for name in names]
    return [[name, s.st_size, s.st_mtime_ns] for name, s in zip(names, status, strict=True)]


def _versions(folder):
    """The prepared versions in a dataset's folder, the oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in names if os.path.isfile(os.path.join(folder, name, 'dataset_info.json'))]
    numbers = [(tuple(int(part) for part in name.split('.')), name) for name in names if _is_version(name)]
    return [name for _, name in sorted(numbers)]


def _is_version(name):
    return all(part.isdigit() for part in name.split('.'))


SOURCES = {'folder': folder, 'tfds': tfds}


def digest_of(identity):
    """What a JSON value is hashed by; names that are no Unicode are kept as they are."""
    return json.dumps(identity, sort_keys=True).encode()
