"""Conversion between a tree of our parameters and PyTorch's flat dict of named tensors."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Path = tuple[Any, ...]  # of a parameter in our tree, such as ('down', 0, 'blocks', 1, 'conv1', 'kernel')
Names = Callable[[Path], tuple[str, ...]]  # the names that a parameter may have in the files, the current one first


class Found(NamedTuple):
    """What the files of another project hold.

    Attributes:
        settings: {part of the config: {key: value}}, named as in configs/default.py.
        weights: {'params' and perhaps 'ema': {name in the files: tensor}}.
        names: maps the path of a parameter of ours to the names that it may have in the files.
        facts: other values in the files, as JSON, for the record.
        betas: β_1 … β_T, if the files list them instead of naming a schedule.
    """

    settings: dict[str, dict[str, Any]]
    weights: dict[str, dict[str, np.ndarray]]
    names: Names
    facts: dict[str, Any]
    betas: list[float] | None = None


# Kernels: convolutions (height, width, in, out) → (out, in, height, width), linear layers (in, out) → (out, in).
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
MOST_ERRORS = 8  # the most that one message lists


def leaves(tree: Mapping[Any, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the path and the value of each leaf of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def to_arrays(params: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Return {name: array} of our parameters as they are, such as 'down.0.blocks.1.conv1.kernel'."""
    return {'.'.join(map(str, path)): np.ascontiguousarray(leaf) for path, leaf in leaves(params)}


def to_tensors(params: Mapping[Any, Any], names: Names) -> dict[str, np.ndarray]:
    """Convert our parameters to PyTorch's layout.

    Args:
        params: a tree of our parameters.
        names: maps a parameter's path to the names that it may have; the first one is used.

    Returns:
        {name: float32 tensor}.
    """
    return {
        names(path)[0]: np.ascontiguousarray(np.asarray(leaf, np.float32).transpose(TO_TORCH[leaf.ndim]))
        for path, leaf in leaves(params)
    }


def with_no_class(embedding: np.ndarray) -> np.ndarray:
    """Return the linear layer that embeds classes and "no class", in PyTorch's layout, from a table of embeddings.

    Args:
        embedding: (n, E), a row for each class.

    Returns:
        (E, n + 1). The last column is zeros, with which the network is that without an embedding of classes.
    """
    return np.concatenate([embedding, np.zeros_like(embedding[:1])]).T


def to_params(tensors: Mapping[str, np.ndarray], expected: Mapping[Any, Any], names: Names, where: str) -> dict:
    """Return our parameters, float32, made from tensors of any floating-point type.

    Args:
        tensors: {name: tensor} in PyTorch's layout; all of them must be used.
        expected: a tree of our parameters, whose leaves need only a shape.
        names: the names that a parameter may have among the tensors.
        where: the file, for errors.

    Returns:
        A tree of NumPy arrays with the structure of `expected`.

    Raises:
        ValueError: tensors are missing or unknown, or have another shape, another type, or values that are not finite;
            the message names them.
    """
    params: dict = {}
    unused, wrong = set(tensors), []
    for path, leaf in leaves(expected):
        shape = tuple(leaf.shape[axis] for axis in TO_TORCH[len(leaf.shape)])
        name = next((name for name in names(path) if name in unused), None)
        if name is None:
            wrong.append(f'{names(path)[0]} {shape} is missing')
            continue
        unused.remove(name)
        tensor = tensors[name]
        if tensor.ndim == len(shape) + 2 and tensor.shape[2:] == (1, 1):  # a 1×1 convolution is a linear layer
            tensor = tensor[:, :, 0, 0]
        if tensor.shape != shape:
            wrong.append(f'{name} has shape {tensor.shape}, but {shape} was expected')
        elif not (np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == 'bfloat16'):
            wrong.append(f'{name} has type {tensor.dtype}, but floating point was expected')
        elif not np.isfinite(array := np.asarray(tensor, np.float32)).all():
            wrong.append(f'{name} contains {math.nan} or {math.inf}')
        else:
            *parents, last = path
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = np.ascontiguousarray(array.transpose(FROM_TORCH[len(shape)]))
    wrong += [f'{name} {tensors[name].shape} is unknown' for name in sorted(unused)]
    if wrong:
        more = f'; and {len(wrong) - MOST_ERRORS} more' if len(wrong) > MOST_ERRORS else ''
        raise ValueError(f'{where} does not hold this network: {"; ".join(wrong[:MOST_ERRORS])}{more}')
    return params
