"""Pictures in a folder or in a zip file."""

import functools
import os
import stat
import zipfile
from collections.abc import Callable
from typing import NamedTuple

from diffusion.data import pictures
from diffusion.data.sources.source import Source
from diffusion.data.sources.splits import SPLIT_NAMES
from diffusion.util import say

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.ppm', '.pgm', '.jp2')


class _File(NamedTuple):
    name: str  # path below the folder or in the zip file
    size: int  # bytes
    stamp: int  # time of modification in nanoseconds, or the CRC in a zip file


def open_folder(place: str, split: str, data_dir: str = '') -> Source:
    """Open all pictures below a folder or in a zip file, chosen by suffix, in the order of their names.

    Symbolic links are followed; each folder is read once. Folders named train/, test/ and the like are the splits;
    without them, all pictures are the split 'train'. If every picture lies in a subfolder of its split, the name of
    that subfolder is its class.

    Args:
        place: path of the folder or zip file; relative paths start at data_dir.
        split: 'train', 'test' or 'validation'.
        data_dir: a folder; '' is the current one.

    Returns:
        The pictures of the split.

    Raises:
        ValueError: there is no such folder, zip file or split, or it contains no pictures.
    """
    if not place:
        raise ValueError(
            "source 'folder' needs a path to a folder or a zip file: --config.data.source=folder:/path/to/pictures"
        )
    path = os.path.abspath(os.path.join(os.path.expanduser(data_dir), os.path.expanduser(place)))
    files, read = _list(path)
    if not files:
        raise ValueError(f'there are no pictures below {path} (by suffix: {" ".join(SUFFIXES)})')
    prefixes = _split_prefixes([file.name for file in files])
    if split not in prefixes:
        raise ValueError(_no_split(split, path, prefixes))
    chosen = sorted(file for file in files if file.name.startswith(prefixes[split]))
    names = [file.name for file in chosen]
    classes = _classes(files, set(prefixes.values()), path)
    numbers = {name: number for number, name in enumerate(classes or ())}
    labels = [numbers.get(name.removeprefix(prefixes[split]).partition('/')[0]) for name in names]
    return Source(
        names=names,
        read=lambda i: pictures.decode(read(names[i])),
        identity=[list(file) for file in chosen],
        label=labels.__getitem__,
        classes=classes,
        encoded=lambda i: read(names[i]),
    )


def _list(path: str) -> tuple[list[_File], Callable[[str], bytes]]:
    """Return the picture files in a folder or zip file, and a function that reads one by its name."""
    if not os.path.exists(path):
        raise ValueError(
            f'there is no folder or zip file {path}\n'
            '    unpack the pictures there, or use another folder:  --config.data.source=folder:/path/to/pictures'
        )
    if os.path.isdir(path):
        return _walk(path), functools.partial(_read_file, path)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f'{path} is neither a folder nor a complete zip file\n'
            '    give the folder that contains the pictures:  --config.data.source=folder:/path/to/pictures'
        )
    try:
        archive = zipfile.ZipFile(path)  # stays open as long as the source; nothing is unpacked
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ValueError(f'the zip file {path} is damaged ({error}): download or create it again') from error
    files = [_File(i.filename, i.file_size, i.CRC) for i in archive.infolist() if _is_picture(i.filename)]
    return files, functools.partial(_read_member, archive)


def _split_prefixes(names: list[str]) -> dict[str, str]:
    """Return {split: prefix of its files' names}; all the splits may lie in one outer folder."""
    tops = {name.partition('/')[0] if '/' in name else '' for name in names}
    known = {'train', *SPLIT_NAMES['test']}
    outer = f'{next(iter(tops))}/' if len(tops) == 1 and tops.isdisjoint({'', *known}) else ''
    found = {name.removeprefix(outer).partition('/')[0] for name in names}
    prefixes = {'train': f'{outer}train/'} if 'train' in found else {}
    for split, folders in SPLIT_NAMES.items():
        folder = next((folder for folder in folders if folder in found), None)
        if folder:
            prefixes[split] = f'{outer}{folder}/'
    return prefixes or {'train': outer}


def _no_split(split: str, path: str, prefixes: dict[str, str]) -> str:
    if list(prefixes) == ['train']:
        return (
            f"there is no folder {split}/ in {path}, so all its pictures are the split 'train'; move the held-out "
            f"pictures to {split}/ and the others to train/, or use the split 'train'"
        )
    return f'there is no split {split!r} in {path}, which has {", ".join(prefixes)}'


def _classes(files: list[_File], prefixes: set[str], path: str) -> list[str] | None:
    """Return the names of the class folders in all splits, so that a number means the same class in each."""
    inner = [file.name.removeprefix(prefix) for file in files for prefix in prefixes if file.name.startswith(prefix)]
    loose = sum('/' not in name for name in inner)
    if not loose:
        return sorted({name.partition('/')[0] for name in inner})
    if loose < len(inner):
        say(f'no labels: {loose} of {len(inner)} pictures in {path} are not in a class folder')
    return None


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not any(map(_is_hidden, name.split('/')))


def _is_hidden(part: str) -> bool:
    return part == '__MACOSX' or (part.startswith('.') and part not in ('.', '..'))


def _warn(error: OSError) -> None:
    say(f'warning: the folder {error.filename!r} cannot be read ({error.strerror}); its pictures are left out')


def _walk(root: str) -> list[_File]:
    """Return the picture files below a folder."""
    files, seen = [], set()
    for parent, folders, names in os.walk(root, followlinks=True, onerror=_warn):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        real = os.path.realpath(parent)
        if real in seen:  # reached again by a link
            folders.clear()
            continue
        seen.add(real)
        below = os.path.relpath(parent, root)
        for name in names:
            name = name if below == '.' else os.path.join(below, name)
            if _is_picture(name):
                try:
                    status = os.stat(os.path.join(root, name))
                    if stat.S_ISREG(status.st_mode):
                        files.append(_File(name, status.st_size, status.st_mtime_ns))
                except OSError:  # a broken link; reading it reports the reason
                    files.append(_File(name, -1, 0))
    return files


def _read_file(root: str, name: str) -> bytes:
    try:
        with open(os.path.join(root, name), 'rb') as file:
            return file.read()
    except OSError as error:
        raise ValueError(f'cannot be read ({error.strerror})') from error


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except Exception as error:  # zipfile and zlib raise several types: damaged, encrypted, unknown compression
        raise ValueError(f'cannot be read from the zip file ({type(error).__name__}: {error})') from error
