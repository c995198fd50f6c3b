"""A tree of our parameters, and the same as PyTorch's flat dict of named tensors."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Found(NamedTuple):
    """What the files of another project hold."""

    settings: dict[str, dict[str, Any]]  # {part of the config: {key: value}}, named as in configs/default.py
    weights: dict[str, dict[str, np.ndarray]]  # {'params' and perhaps 'ema': {their name: tensor}}
    names: Callable[[tuple], tuple[str, ...]]  # path of a parameter of ours → the names it may have there
    facts: dict[str, Any]  # what else the files say, for the record


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
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # of pickle, zipfile, torch and the operating system
        raise ValueError(f'{path} cannot be read as tensors alone ({type(error).__name__}: {error})') from error


def from_torch(state, where):
    """{name: numpy array, float32} of a PyTorch state dict. Raises ValueError, with `where`, for anything else."""
    if not isinstance(state, dict) or not all(hasattr(tensor, 'detach') for tensor in state.values()):
        raise ValueError(f'{where} holds no state dict, by name a tensor, but {type(state).__name__}')
    return {name: tensor.detach().float().numpy() for name, tensor in state.items()}
