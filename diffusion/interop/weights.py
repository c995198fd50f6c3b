"""Reads files of named tensors, safetensors and those of PyTorch, and writes safetensors.

No code in a file is ever run.
"""

import os
import pickle
import re
import stat
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffusion.util import parse_json, replacing

FLOATING = 'floating point of at least 16 bits was expected'


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """Return {name: tensor} of a safetensors file.

    Raises:
        ValueError: the file is missing or damaged, or holds a type that NumPy does not have.
    """
    if not os.path.exists(path):
        raise ValueError(f'{path} is missing')
    require_file(path)
    try:
        with safe_open(path, framework='np') as file:
            return {name: _read_tensor(file, name, path) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ValueError(f'{path} cannot be read{_truncated_at(path)} ({error}): download it again') from error


def write_safetensors(path: str, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write {name: tensor} atomically, with the permissions of any new file: safetensors lets only the owner read.

    Args:
        path: the file; a link of this name is replaced.
        tensors: contiguous arrays.
        metadata: texts for the header of the file.

    Raises:
        OSError, safetensors.SafetensorError: the file cannot be written.
    """
    with replacing(path) as file:
        permissions = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        save_file(dict(tensors), file.name, metadata=metadata)
        os.chmod(file.name, permissions)


def require_file(path: str) -> None:
    """Raise ValueError if a pipe or a device is where a file should be: reading it could block for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f'{path} is not a regular file')


def _read_tensor(file: Any, name: str, path: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (AttributeError, TypeError) as error:  # the type does not exist in NumPy
        raise ValueError(f'{path} holds {name} as {file.get_slice(name).get_dtype()}, but {FLOATING}') from error


def _truncated_at(path: str) -> str:
    """Return ': it ends within NAME', with the first tensor that a truncated file cuts off; '' if that is unknown."""
    try:
        with open(path, 'rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            header = parse_json(file.read(min(length, os.path.getsize(path))))
        ends = {entry['data_offsets'][1]: name for name, entry in header.items() if name != '__metadata__'}
        end = min(end for end in ends if 8 + length + end > os.path.getsize(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return ''
    return f': it ends within {ends[end]}'


def load_torch(path: str) -> Any:
    """Return what PyTorch saved in a file: tensors, and plain containers of them.

    Raises:
        ValueError: PyTorch is not installed or too old, or the file is damaged or holds anything else.
    """
    require_file(path)
    try:
        import torch
    except ImportError as error:
        raise ValueError(f'{path} is a PyTorch file, and PyTorch is not installed: pip install torch') from error
    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6):
        raise ValueError(
            f'{path} could run code in PyTorch {torch.__version__}, despite weights_only=True (CVE-2025-32434): '
            "pip install 'torch>=2.6'"
        )
    try:
        damaged = _damaged_member(path)
        saved = None if damaged else torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:  # its own message advises to run the code in the file
        name = re.search(r'GLOBAL (\S+)', str(error))
        what = f'it holds {name[1]}' if name else 'it is damaged, or not a PyTorch file'
        raise ValueError(
            f'{path} cannot be read as tensors: {what}. No code in it was run. Save only the state dict'
        ) from error
    except Exception as error:  # zipfile, torch and the operating system raise many kinds
        raise ValueError(f'{path} cannot be read as tensors ({one_line(error)})') from error
    if damaged:
        raise ValueError(f'{path} is damaged: the checksum of {damaged} in it does not match. Download it again')
    return saved


def _damaged_member(path: str) -> str | None:
    """Return the first member of a zip archive whose checksum is wrong: PyTorch does not check them."""
    if not zipfile.is_zipfile(path):  # the format before PyTorch 1.6
        return None
    with zipfile.ZipFile(path) as archive:
        require_uncompressed(archive)
        name = archive.testzip()
        return name if name and archive.getinfo(name).CRC else None  # without its compute_crc32, PyTorch writes zeros


def require_uncompressed(archive: zipfile.ZipFile) -> None:
    """Raise ValueError if a member is compressed, and may expand to any size; PyTorch compresses none."""
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f'{member.filename} in it is compressed, which PyTorch never does')


def state_dict(saved: Any, where: str) -> dict[str, np.ndarray]:
    """Return a PyTorch state dict as {name: float32 array}.

    Args:
        saved: the result of `load_torch`.
        where: the file, for errors.

    Raises:
        ValueError: it is not a state dict, or a tensor is not floating point or has no values; the message names it.
    """
    if not isinstance(saved, dict):
        raise ValueError(f'{where} holds {type(saved).__name__}, but a state dict, {{name: tensor}}, was expected')
    arrays = {}
    for name, tensor in saved.items():
        if not isinstance(name, str) or not hasattr(tensor, 'detach'):
            raise ValueError(
                f'{where} is not a state dict, {{name: tensor}}: it holds {name!r} with {type(tensor).__name__}'
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f'{where} holds {name} as {tensor.dtype}, but {FLOATING}')
        try:
            arrays[name] = tensor.detach().float().numpy()
        except (RuntimeError, TypeError) as error:
            found = f'{tensor.layout} on device {tensor.device}'
            raise ValueError(f'{where} holds {name} as {found}, but a dense tensor with values was expected') from error
    return arrays


def require_image_size(path: str, image_size: int) -> None:
    """Raise ValueError if the images' size, which the file does not state, is not given either."""
    if image_size < 1:
        raise ValueError(f'{path} does not say how large its images are: set config.data.image_size')


def one_line(error: BaseException, most: int = 300) -> str:
    """Return the type and the message of an exception in one line of at most `most` characters."""
    return f'{type(error).__name__}: {" ".join(str(error).split())}'[:most]
