"""A tree of our parameters, and the same as PyTorch's flat dict of named tensors."""

import math
import pickle
import re
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Found(NamedTuple):
    """What the files of another project hold."""

    settings: dict[str, dict[str, Any]]  # {part of the config: {key: value}}, named as in configs/default.py
    weights: dict[str, dict[str, np.ndarray]]  # {'params' and perhaps 'ema': {their name: tensor}}
    names: Callable[[tuple], tuple[str, ...]]  # path of a parameter of ours → the names it may have there
    facts: dict[str, Any]  # what else the files say, for the record; as JSON has it
    betas: list[float] | None = None  # β_1 … β_T, where the files list them instead of naming a schedule


def leaves(tree, path=()):
    """(path, leaf) of each leaf of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


# Kernels: convolutions (height, width, in, out) → (out, in, height, width), linear layers (in, out) → (out, in).
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


def put(params, names):
    """{name: tensor} of our parameters, each under its first name, in PyTorch's layout."""
    return {
        names(path)[0]: np.ascontiguousarray(np.asarray(leaf, np.float32).transpose(TO_TORCH[leaf.ndim]))
        for path, leaf in leaves(params)
    }


def take(tensors, expected, names, where):
    """Our parameters, float32, from tensors of any floating type.

    tensors: {name: tensor}, all of which must be used; expected: our tree, of anything with a shape;
    where: the file, for errors. Raises ValueError, which names the tensors, where one is missing, unknown,
    of another shape, of no floating type, or not finite.
    """
    params, unknown, wrong = {}, set(tensors), []
    for path, leaf in leaves(expected):
        shape = tuple(leaf.shape[axis] for axis in TO_TORCH[len(leaf.shape)])
        name = next((name for name in names(path) if name in unknown), None)
        if name is None:
            wrong.append(f'{names(path)[0]} {shape} is missing')
            continue
        unknown.remove(name)
        tensor = tensors[name]
        if tensor.ndim == len(shape) + 2 and tensor.shape[2:] == (1, 1):  # a 1×1 convolution is a linear layer
            tensor = tensor[:, :, 0, 0]
        if tensor.shape != shape:
            wrong.append(f'{name} has the shape {tensor.shape}, but {shape} was expected')
        elif not (np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == 'bfloat16'):
            wrong.append(f'{name} holds {tensor.dtype}, but floating-point numbers were expected')
        elif not np.isfinite(array := np.asarray(tensor, np.float32)).all():
            wrong.append(f'{name} holds {math.nan} or {math.inf}')
        else:
            *parents, last = path
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = np.ascontiguousarray(array.transpose(FROM_TORCH[len(shape)]))
    wrong += [f'{name} {tensors[name].shape} is not known' for name in sorted(unknown)]
    if wrong:
        more = f'; and {len(wrong) - 8} more' if len(wrong) > 8 else ''
        raise ValueError(f'{where} does not hold this network: {"; ".join(wrong[:8])}{more}')
    return params


def load_torch(path):
    """What PyTorch saved, tensors as they are; no code in the file is run. Raises ValueError where it cannot be."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(f'{path} is a file of PyTorch, which is not installed: pip install torch') from error
    try:
        damaged = damaged_member(path)
        saved = None if damaged else torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:  # whose message advises to run what the file holds
        name = re.search(r'GLOBAL (\S+)', str(error))
        what = f'it holds {name[1]}, which is none' if name else 'it is damaged, or of another kind'
        raise ValueError(
            f'{path} cannot be read as tensors alone: {what}; nothing in it was run. Save its state dict alone'
        ) from error
    except Exception as error:  # of zipfile, torch and the operating system
        raise ValueError(f'{path} cannot be read as tensors alone ({in_a_line(error)})') from error
    if damaged:
        raise ValueError(
            f'{path} is damaged: the checksum of {damaged} in it is not that written beside it. Fetch it again'
        )
    return saved


def damaged_member(path):
    """The first file in a zip whose bytes have another checksum than is written beside it, or None.

    PyTorch does not look at them. Without its compute_crc32 it writes zeros, which say nothing.
    """
    if not zipfile.is_zipfile(path):  # as PyTorch saved before its version 1.6
        return None
    with zipfile.ZipFile(path) as archive:
        name = archive.testzip()
        return name if name and archive.getinfo(name).CRC else None


def in_a_line(error, most=300):
    """The type and the message of an exception of others, cut to so many characters."""
    return f'{type(error).__name__}: {" ".join(str(error).split())}'[:most]


FLOATING = 'floating-point numbers of at least 16 bits were expected'


def from_torch(state, where):
    """{name: numpy array, float32} of a PyTorch state dict.

    Raises ValueError, with `where`, for anything else, and names the tensor that is not floating or has no values.
    """
    if not isinstance(state, dict) or not all(hasattr(tensor, 'detach') for tensor in state.values()):
        raise ValueError(f'{where} holds no state dict, by name a tensor, but {type(state).__name__}')
    arrays = {}
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f'{where} holds no state dict: a tensor is called {name!r}, but names were expected')
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f'{where} holds {name} as {tensor.dtype}, but {FLOATING}')
        try:
            arrays[name] = tensor.detach().float().numpy()
        except (RuntimeError, TypeError) as error:
            found = f'{tensor.layout} on the device {tensor.device}'
            raise ValueError(f'{where} holds {name} as {found}, but a dense tensor with values was expected') from error
    return arrays
