"""Random numbers for a batch of images, from one key for the batch or from one key for each image.

With a key of its own, an image has the same draws whatever the batch that it is in.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

Keys = Key[Array, ''] | Key[Array, 'B']  # typed


def normal(key: Keys, shape: tuple[int, ...]) -> Float[Array, 'B *shape']:
    """Draw from N(0, 1): (B, ...) float32 of `shape`."""
    return _draw(jax.random.normal, key, shape, jnp.float32)


def signs(key: Keys, shape: tuple[int, ...]) -> Float[Array, 'B *shape']:
    """Draw −1 or 1 with equal probability (Rademacher): (B, ...) float32 of `shape`."""
    return _draw(jax.random.rademacher, key, shape, jnp.float32)


def integers(key: Keys, batch: int, low: ArrayLike, high: ArrayLike) -> Int[Array, 'B']:
    """Draw from low, …, high − 1 with equal probability: (batch,) int32."""
    return _draw(jax.random.randint, key, (batch,), low, high, jnp.int32)


def fold_in(key: Keys, number: ArrayLike) -> Keys:
    """Return other keys for each number, as `jax.random.fold_in`."""
    return jax.vmap(jax.random.fold_in, (0, None))(key, number) if key.ndim else jax.random.fold_in(key, number)


def split(key: Keys, count: int = 2) -> list[Keys]:
    """Return `count` independent keys, as `jax.random.split`."""
    if key.ndim:
        return list(jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(key))
    return list(jax.random.split(key, count))


def _draw(draw: Callable, key: Keys, shape: tuple[int, ...], *arguments: Any) -> Any:
    """draw(key, shape, …), or that of each image from its own key.

    Raises:
        ValueError: there are not as many keys as images.
    """
    if key.ndim == 0:
        return draw(key, shape, *arguments)
    if key.shape != shape[:1]:
        raise ValueError(
            f'there are keys of the shape {key.shape} for {shape[0]} images: give one key, or one an image'
        )
    return jax.vmap(lambda key: draw(key, shape[1:], *arguments))(key)
