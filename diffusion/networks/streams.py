"""Random streams for networks that are traced in linear time."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Stream(nnx.RngStream):
    """An `nnx.RngStream` with the same keys, but a Python integer as its count.

    nnx counts in a JAX array and asks it for its sharding at each update. In a traced function JAX answers after a
    search through all operations so far, which made the tracing of a U-Net quadratic in its size.
    """

    def __init__(self, key: jax.Array | int, *, tag: str):
        super().__init__(key, tag=tag)
        self.count: Any = 0

    def __call__(self) -> jax.Array:
        self.count += 1
        return jax.random.fold_in(self.key[...], self.count - 1)

    def many(self, number: int) -> list[jax.Array]:
        """Return the keys of as many calls, made together: on a GPU, several kernels for each of them take longer."""
        counts = self.count + jnp.arange(number)
        self.count += number
        return list(jax.vmap(jax.random.fold_in, (None, 0))(self.key[...], counts))


def make_rngs(**keys: jax.Array | int) -> nnx.Rngs:
    """Return the `nnx.Rngs` of these streams, such as default=key or dropout=key, with typed keys or seeds."""
    streams = nnx.Rngs()
    for tag, key in keys.items():
        setattr(streams, tag, Stream(key, tag=tag))
    return streams
