"""Reads named tensors in files that PyTorch saved, without PyTorch. No code in a file is ever run.

A file is a pickle of containers and of references to storages. The bytes of the storages are other members of the same
zip archive or, before PyTorch 1.6, follow the pickle. The unpickler knows the few names that a state dict needs and
refuses all others.
"""

import collections
import math
import operator
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from diffusion.interop.weights import one_line, require_uncompressed
from diffusion.util import open_regular

MAGIC = 0x1950A86A20F9469CFC6C  # the first value in a file of the format before PyTorch 1.6
STORAGES = {
    'FloatStorage': np.float32,
    'DoubleStorage': np.float64,
    'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16,
    'LongStorage': np.int64,
    'IntStorage': np.int32,
}


class _Storage:
    """The values of one or more tensors; their bytes are read later."""

    def __init__(self, dtype: type, key: str, count: int):
        self.dtype, self.key, self.count = np.dtype(dtype), key, count
        self.values: np.ndarray | None = None

    def fill(self, content: bytes, byte_order: str = '<') -> None:
        raw = np.frombuffer(content, f'{byte_order}u{self.dtype.itemsize}', self.count)
        self.values = raw.astype(raw.dtype.newbyteorder('='), copy=False).view(self.dtype)


class _Tensor:
    """A view of a storage."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *unused: Any):
        self._storage, self._offset = storage, operator.index(offset)
        self._shape, self._strides = (tuple(map(operator.index, numbers)) for numbers in (shape, strides))

    def array(self) -> np.ndarray:
        """Return the values, read-only and not copied. Raises ValueError if the view leaves its storage."""
        values, shape, strides = self._storage.values, self._shape, self._strides
        if values is None or len(shape) != len(strides) or min((self._offset, *shape, *strides)) < 0:
            raise ValueError('a tensor has no values')
        if not math.prod(shape):
            return np.zeros(shape, values.dtype)
        if self._offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) >= len(values):
            raise ValueError('a tensor is larger than its storage')
        if math.prod(shape) > len(values):
            raise ValueError('a tensor repeats its values')  # a small file may expand to any size
        # Not a copy: many tensors of a small file may share one storage.
        return np.lib.stride_tricks.as_strided(
            values[self._offset :], shape, [step * values.itemsize for step in strides], writeable=False
        )


class _Unpickler(pickle.Unpickler):
    """Rebuilds containers and `_Tensor`s, and nothing else."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        # A pickle may set attributes of what is returned here, so this is immutable or made anew for each file.
        known: dict[str, Callable] = {
            'collections.OrderedDict': collections.OrderedDict,
            'torch._utils._rebuild_tensor_v2': lambda *arguments: _Tensor(*arguments),
            'torch._utils._rebuild_parameter': lambda tensor, *unused: tensor,
        }
        if f'{module}.{name}' in known:
            return known[f'{module}.{name}']
        if module == 'torch' and name in STORAGES:
            return name
        raise pickle.UnpicklingError(
            f'it holds {module}.{name}, but only named tensors are read; no code in it was run'
        )

    def persistent_load(self, reference: Any) -> _Storage:
        kind, dtype, key, _, count, *view = reference
        if kind != 'storage' or any(view):
            raise pickle.UnpicklingError(f'it refers to a {kind} that is not a plain storage')
        return self.storages.setdefault(key, _Storage(STORAGES[dtype], key, count))


def read_state_dict(path: str) -> dict[str, np.ndarray]:
    """Return {name: tensor} of a state dict that PyTorch saved, in either of its formats.

    Raises:
        ValueError: the file is missing or damaged, or holds anything but named tensors.
    """
    try:
        with open_regular(path, 'rb') as file:
            state = _read_zip(path) if zipfile.is_zipfile(file) else _read_legacy(path)
        if not isinstance(state, dict) or not all(isinstance(value, _Tensor) for value in state.values()):
            raise ValueError('it is no state dict, {name: tensor}')
        return {str(name): tensor.array() for name, tensor in state.items()}
    except Exception as error:  # zipfile, pickle and the operating system raise many kinds for damaged files
        raise ValueError(f'{path} cannot be read as tensors of PyTorch ({one_line(error)})') from error


def _read_zip(path: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        require_uncompressed(archive)
        (pickled,) = (name for name in archive.namelist() if name.endswith('/data.pkl'))
        folder = pickled.removesuffix('data.pkl')
        with archive.open(pickled) as file:
            unpickler = _Unpickler(file)  # type: ignore[arg-type]
            state = unpickler.load()
        written_by = archive.read(f'{folder}byteorder') if f'{folder}byteorder' in archive.namelist() else b'little'
        for storage in unpickler.storages.values():
            storage.fill(archive.read(f'{folder}data/{storage.key}'), '>' if written_by == b'big' else '<')
    return state


def _read_legacy(path: str) -> Any:
    with open(path, 'rb') as file:
        if _Unpickler(file).load() != MAGIC:
            raise ValueError('it does not begin as files of PyTorch do')
        for _ in ('protocol version', 'sizes of integers'):
            _Unpickler(file).load()
        unpickler = _Unpickler(file)
        state = unpickler.load()
        for key in _Unpickler(file).load():
            storage = unpickler.storages[key]
            (count,) = np.frombuffer(file.read(8), '<i8')
            if count != storage.count:
                raise ValueError(f'storage {key} has {count} values instead of {storage.count}')
            storage.fill(file.read(storage.count * storage.dtype.itemsize))
    return state
