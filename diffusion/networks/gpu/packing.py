"""One vector instead of hundreds of arrays: what is done to each parameter becomes one kernel."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ALIGNMENT = 128  # elements; each array begins at a multiple of it, as fast loads need
MULTIPLE = 1024  # elements; what is split over devices is a multiple of it on each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A tree of arrays as one vector.

    Kernels of convolutions, (height, width, in, out), are stored with their last axis first, as cuDNN reads and writes
    them. Zeros follow each array up to a multiple of ALIGNMENT.
    """

    vector: Float[Array, 'P']
    treedef: jax.tree_util.PyTreeDef = dataclasses.field(metadata={'static': True})
    shapes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={'static': True})


def pack(tree: Any, like: Any, parts: int = 1) -> Any:
    """Replace each subtree of float32 arrays that has the structure of `like` by one vector.

    Args:
        tree: a pytree of arrays.
        like: the parameters.
        parts: into how many equal parts the vectors can be divided; zeros at their ends make that possible.

    Returns:
        The tree with a Packed in the place of each such subtree.
    """
    treedef: Any = jax.tree.structure(like)

    def found(node: Any) -> bool:
        return jax.tree.structure(node) == treedef

    def packed(node: Any) -> Any:
        if not found(node):
            return node
        leaves = jax.tree.leaves(node)
        return Packed(_concatenate(leaves, parts * MULTIPLE), treedef, tuple(leaf.shape for leaf in leaves))

    return jax.tree.map(packed, tree, is_leaf=found)


def unpack(tree: Any) -> Any:
    """Replace each Packed of a tree by the arrays that it was made from. It can be differentiated in both modes."""

    def is_packed(node: Any) -> bool:
        return isinstance(node, Packed)

    return jax.tree.map(lambda node: _unpack(node) if is_packed(node) else node, tree, is_leaf=is_packed)


def _unpack(packed: Packed) -> Any:
    def split(_: tuple, vector: Array) -> list[Array]:
        leaves, start = [], 0
        for shape in packed.shapes:
            size = math.prod(shape)
            leaves.append(_from_vector(vector[start : start + size], shape))
            start += _padded(size, ALIGNMENT)
        return leaves

    def concatenate(_: tuple, leaves: Sequence[Array]) -> Array:
        return _concatenate(leaves, len(packed.vector))

    # JAX's own transpose of a slice is a vector of zeros for each array.
    leaves = jax.custom_derivatives.linear_call(split, concatenate, (), packed.vector)
    return jax.tree.unflatten(packed.treedef, leaves)


def _from_vector(piece: Array, shape: tuple[int, ...]) -> Array:
    return jnp.moveaxis(piece.reshape(shape[-1:] + shape[:-1]), 0, -1) if len(shape) == 4 else piece.reshape(shape)


def _concatenate(leaves: Sequence[Array], multiple: int) -> Array:
    pieces, total = [], 0
    for leaf in leaves:
        piece = (jnp.moveaxis(leaf, -1, 0) if leaf.ndim == 4 else leaf).ravel()
        pieces.append(jnp.pad(piece, (0, _padded(piece.size, ALIGNMENT) - piece.size)))
        total += pieces[-1].size
    return jnp.pad(jnp.concatenate(pieces), (0, _padded(total, multiple) - total))


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
