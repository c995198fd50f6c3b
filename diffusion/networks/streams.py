"""Random streams for networks that are traced in linear time."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

MANY = 64


class Stream(nnx.RngStream):
    """An `nnx.RngStream` with the same keys, but a Python integer as its count.

    nnx counts in a JAX array and asks it for its sharding at each update. In a traced function JAX answers after a
    search through all operations so far, which made the tracing of a U-Net quadratic in its size.

    Keys are made many at a time: on a GPU, several kernels for each of them would take longer than the bits.
    """

    def __init__(self, key: jax.Array | int, *, tag: str):
        super().__init__(key, tag=tag)
        self.count: Any = 0

    def __call__(self) -> jax.Array:
        at = self.count % MANY
        if at == 0:
            self._keys = jax.vmap(jax.random.fold_in, (None, 0))(self.key[...], self.count + jnp.arange(MANY))
        self.count += 1
        return self._keys[at]


def make_rngs(**keys: jax.Array | int) -> nnx.Rngs:
    """Return the `nnx.Rngs` of these streams, such as default=key or dropout=key, with typed keys or seeds."""
    streams = nnx.Rngs()
    for tag, key in keys.items():
        setattr(streams, tag, Stream(key, tag=tag))
    return streams
