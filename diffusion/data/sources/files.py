"""The picture files in a folder or in a zip file."""

import collections
import contextlib
import dataclasses
import functools
import os
import re
import stat
import zipfile
from collections.abc import Callable, Set
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from diffusion.data import pictures
from diffusion.data.sources.source import LARGE, one_large
from diffusion.util import open_regular, say

MOST_VISITS = 16  # how often one folder is read through links: folders that link to each other would have no end


class _Folder(NamedTuple):
    path: str  # below the root; '' is the root
    inodes: tuple[int, ...]  # one for each folder on the path, the root's first


class File(NamedTuple):
    """A picture file."""

    name: str  # path below the folder or in the zip file, with '/'
    size: int  # bytes
    stamp: int  # time of modification in nanoseconds, or the CRC in a zip file
    inode: int | None  # the same for all links to one file; None in a zip file
    key: Any  # by which `Files` opens it

    @property
    def folder(self) -> str:
        """The folder of the file, '' at the top."""
        return self.name.rpartition('/')[0]


@dataclasses.dataclass(frozen=True)
class Files:
    """The picture files below a folder or in a zip file.

    Attributes:
        path: the folder or zip file.
        files: the pictures, in the order of their names.
        others: how many files of each kind are not read.
        open: opens a file by its key.
    """

    path: str
    files: list[File]
    others: collections.Counter[str]
    open: Callable[[Any], IO[bytes]]

    def encoded(self, file: File, max_pixels: int) -> bytes:
        """Return the content of a file.

        Args:
            file: one of `files`.
            max_pixels: the largest picture that may be read.

        Raises:
            ValueError: it cannot be read, or has more bytes than a picture of max_pixels, or of the size in its header.
        """
        most = pictures.most_bytes(max_pixels)
        if file.size > most:
            raise ValueError(
                f'has {file.size:,} bytes, more than the {most:,} that a picture of data.max_pixels={max_pixels} takes'
            )
        try:
            with self.open(file.key) as opened:
                # Only in a zip file may a large file take little of the disk.
                if file.size <= LARGE or not isinstance(file.key, zipfile.ZipInfo):
                    return opened.read(file.size)
                start = opened.read(LARGE)
                pixels = pictures.pixels(start)
                if pixels is None or file.size <= LARGE + pictures.BYTES_PER_PIXEL * pixels:
                    return start + opened.read(file.size - LARGE)
        except Exception as error:  # OSError; zipfile and zlib raise several types: damaged, encrypted, unknown
            why = getattr(error, 'strerror', None) or f'{type(error).__name__}: {error}'
            raise ValueError(f'cannot be read ({why})') from error
        raise ValueError(f'has {file.size:,} bytes, but its header is that of a picture of {pixels:,} pixels')

    def picture(self, file: File, max_pixels: int) -> UInt8[np.ndarray, 'H W C']:
        """Return the decoded picture, as `pictures.decode` does."""
        with one_large if file.size > LARGE else contextlib.nullcontext():
            return pictures.decode(self.encoded(file, max_pixels), max_pixels)


def find(path: str) -> Files:
    """Find the picture files below a folder or in a zip file: by suffix, or by content where there is no suffix.

    Symbolic links are followed, except to a folder above them. Hidden files and folders are ignored.

    Args:
        path: the folder or zip file.

    Returns:
        The picture files, sorted by name.

    Raises:
        ValueError: there is no such folder or zip file, or it cannot be read.
    """
    if not os.path.exists(path):
        raise ValueError(
            f'there is no folder or zip file {path}\n'
            '    unpack the pictures there, or use another folder:  --config.data.source=folder:/path/to/pictures'
        )
    suffixes = frozenset(pictures.suffixes())
    opener: Callable[[Any], IO[bytes]]
    if os.path.isdir(path):
        files, others = _walk(path, suffixes)
        opener = functools.partial(_open, path)
    else:
        archive = _zip_file(path)  # stays open as long as the source; nothing is unpacked
        files, others = _members(archive, suffixes)
        opener = archive.open
        if len(files) > len({file.name for file in files}):
            say(f'warning: several files in {path} have the same name; all of them are used')
    files.sort(key=lambda file: file[:3])
    return Files(path, files, others, opener)


def _zip_file(path: str) -> zipfile.ZipFile:
    if not os.path.isfile(path) or not zipfile.is_zipfile(path):  # opening a pipe would wait for ever
        raise ValueError(
            f'{path} is neither a folder nor a complete zip file\n'
            '    give the folder that contains the pictures:  --config.data.source=folder:/path/to/pictures'
        )
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ValueError(f'the zip file {path} is damaged ({error}): download or create it again') from error


def _members(archive: zipfile.ZipFile, suffixes: Set[str]) -> tuple[list[File], collections.Counter[str]]:
    """Return the picture files in a zip file, and the kinds of the others."""
    files, others = [], collections.Counter[str]()
    for info in archive.infolist():
        name = _clean(info.filename)
        if info.filename.endswith(('/', '\\')) or any(map(_is_hidden, name.split('/'))):
            continue
        kind = 'link' if stat.S_ISLNK(info.external_attr >> 16) else _kind(name)
        if _is_picture(kind, suffixes, functools.partial(archive.open, info)):
            files.append(File(name, info.file_size, info.CRC, None, info))
        else:
            others[kind] += 1
    return files, others


def _walk(root: str, suffixes: Set[str]) -> tuple[list[File], collections.Counter[str]]:
    """Return the picture files below a folder, and the kinds of the others."""
    files, others, visits, left_out = [], collections.Counter[str](), collections.Counter[int](), 0
    folders: list[_Folder] = [_Folder('', (_inode(os.stat(root)),))]
    links: list[_Folder] = []  # links to folders, which are read last: a folder is first read under its own path
    while folders or links:
        if not folders:
            folders, links = links, []
        folder = folders.pop()
        visits[folder.inodes[-1]] += 1
        if visits[folder.inodes[-1]] > MOST_VISITS:
            left_out += 1
            continue
        try:
            with os.scandir(os.path.join(root, folder.path)) as scan:
                entries = [entry for entry in scan if not _is_hidden(entry.name)]
        except OSError as error:
            where = os.path.join(root, folder.path)
            say(f'warning: the folder {where!r} cannot be read ({error.strerror}); its pictures are left out')
            continue
        for entry in sorted(entries, key=lambda entry: entry.name):
            path, kind = os.path.join(folder.path, entry.name), _kind(entry.name)
            name = _clean(path) if '\\' in path else path
            try:
                status = entry.stat()
            except OSError:  # a broken link; reading it reports the reason
                if kind in suffixes:
                    files.append(File(name, -1, 0, None, path))
                else:
                    others['broken link'] += 1
                continue
            if stat.S_ISDIR(status.st_mode):
                if _inode(status) not in folder.inodes:  # a link to a folder above it leads nowhere
                    below = _Folder(path, (*folder.inodes, _inode(status)))
                    (links if entry.is_symlink() else folders).append(below)
            elif stat.S_ISREG(status.st_mode):
                if _is_picture(kind, suffixes, functools.partial(_open, root, path)):
                    files.append(File(name, status.st_size, status.st_mtime_ns, _inode(status), path))
                else:
                    others[kind] += 1
            else:
                others['pipe or device'] += 1
    if left_out:
        say(f'warning: {left_out} links lead to folders that were read {MOST_VISITS} times already; they are left out')
    return files, others


def _is_picture(kind: str, suffixes: Set[str], opener: Callable[[], IO[bytes]]) -> bool:
    """Return whether a file is read as a picture."""
    if kind:
        return kind in suffixes
    try:
        with opener() as file:
            return pictures.is_picture(file)
    except Exception:  # as in `Files.encoded`
        return False


def _kind(name: str) -> str:
    """Return the suffix in lower case; '' if there is none, or if it has no letter, as in 'frame.0001'."""
    suffix = os.path.splitext(name.rpartition('/')[2])[1].lower()
    return suffix if re.fullmatch(r'\.\w*[^\W\d]\w*', suffix) else ''


def _clean(name: str) -> str:
    """Return a path with '/' alone between its parts; zip files made on Windows may contain backslashes."""
    return '/'.join(part for part in name.replace('\\', '/').split('/') if part not in ('', '.'))


def _is_hidden(part: str) -> bool:
    """Return whether a part of a path is hidden, as the files that file managers and archivers leave behind."""
    return part == '__MACOSX' or (part.startswith('.') and part != '..')


def _open(root: str, path: str) -> IO[bytes]:
    return open_regular(os.path.join(root, path), 'rb')


def _inode(status: os.stat_result) -> int:
    return status.st_dev << 64 | status.st_ino
