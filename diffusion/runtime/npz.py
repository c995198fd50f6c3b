"""Reads .npz files that others made: no pipes, no pickles, and no more than a file may plausibly hold."""

import math
import zipfile
import zlib
from collections.abc import Collection
from typing import IO, Any

import numpy as np

from diffusion.util import npy_header, open_regular

LARGE = 2**30  # bytes; smaller arrays may be compressed to any size
MOST_EXPANSION = 100  # of larger ones; deflate reaches 1000, but only for arrays that hold nothing


def read_npz(path: str, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Return the arrays in an .npz file.

    Args:
        path: the file.
        names: of the arrays that are read, if they are there; None is all.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or an array holds objects, or expands to far more than its size in the file.
    """
    with open_regular(path, 'rb') as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = {member.filename.removesuffix('.npy'): member for member in archive.infolist()}
                asked = members if names is None else members.keys() & set(names)
                return {name: _read(archive, members[name]) for name in sorted(asked)}
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            raise ValueError(f'it is damaged, or no .npz file ({error})') from error


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return (shape, whether in Fortran's order, dtype) of an .npy file, and go to the start of its values.

    Raises:
        ValueError: it is damaged, or no .npy file.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with npy_header():
        return read(file)


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.file_size > LARGE and member.file_size > MOST_EXPANSION * member.compress_size:
        raise ValueError(
            f'{member.filename} has {member.file_size:,} bytes in {member.compress_size:,}, more than {MOST_EXPANSION} '
            'times as many: uncompress it if it is meant'
        )
    with archive.open(member) as file:
        shape, fortran, dtype = read_header(file)
        end = file.tell() + math.prod(shape) * dtype.itemsize
        if dtype.hasobject or end != member.file_size:
            raise ValueError(f'{member.filename} is declared as {dtype} {shape}, but has {member.file_size:,} bytes')
        values: Any = np.frombuffer(file.read(), dtype)  # at the end, zipfile verifies the checksum
    return values.reshape(shape, order='F' if fortran else 'C')
