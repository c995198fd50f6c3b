"""The U-Net for GPUs: fewer kernels, which read and write less."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Num

from diffusion.networks import unet
from diffusion.networks.norm import GroupNorm
from diffusion.networks.unet import DropoutKey, Embedding, Images


def _activated(norm, x):
    """silu(norm(x)). The backward pass computes it again from x and keeps nothing in float32."""
    factor, offset = norm.affine(x.astype(jnp.float32))

    def run(x, factor, offset):
        return nnx.silu(x.astype(jnp.float32) * factor + offset)

    return jax.checkpoint(run, prevent_cse=False)(x, factor, offset)


def _side_by_side(layers: Sequence[nnx.Linear], x: jax.Array) -> jax.Array:
    """Return the outputs of linear layers of one input, concatenated: one matrix product instead of many."""
    kernels, biases = zip(*((layer.kernel[...], layer.bias[...]) for layer in layers), strict=True)  # type: ignore[index]
    dtype = layers[0].dtype
    x, kernel, bias = (a.astype(dtype) for a in (x, jnp.concatenate(kernels, axis=1), jnp.concatenate(biases)))
    return x @ kernel + bias


def _convolve(layer: nnx.Conv, x: Images) -> Images:
    """Apply a convolution of stride 1 without its bias, whose gradient would be one more pass over the activations."""
    x, kernel = (a.astype(layer.dtype) for a in (x, layer.kernel[...]))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


class ResBlock(unet.ResBlock):
    """The block with norms and activations in few passes. `emb` is what `UNet.embed` returns, of all blocks."""

    GroupNorm = GroupNorm
    start: int  # index of this block's first channel in `emb`

    def __call__(self, x: Images, emb: Embedding, dropout_key: DropoutKey = None) -> Images:
        h = _convolve(self.conv1, _activated(self.norm1, x))
        h += emb[:, None, None, self.start : self.start + self.time.out_features]
        h = self.dropout(_activated(self.norm2, h), deterministic=dropout_key is None, rngs=dropout_key)
        h = self.conv2(h)
        return (x if self.shortcut is None else self.shortcut(x)) + h


class Attention(unet.Attention):
    """Attention with the norm in few passes, and queries, keys and values by one product."""

    GroupNorm = GroupNorm

    def project(self, h: Images) -> Sequence[Images]:
        return jnp.split(_side_by_side([self.query, self.key, self.value], h), 3, axis=-1)


class UNet(unet.UNet):
    """The U-Net made of the parts above."""

    GroupNorm = GroupNorm
    ResBlock = ResBlock
    Attention = Attention

    # Whoever asks which keys of a config the network takes sees the signature of the plain one.
    @functools.wraps(unet.UNet.__init__)  # type: ignore[misc]
    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        start = 0
        for block in self._blocks():
            block.start = start
            start += block.time.out_features

    def embed(self, t: Num[Array, 'B'], labels: Int[Array, 'B'] | None) -> Embedding:
        """Return what each residual block adds after its first convolution, its bias included; side by side."""
        blocks = self._blocks()
        shifts = _side_by_side([block.time for block in blocks], nnx.silu(super().embed(t, labels)))
        return shifts + jnp.concatenate([block.conv1.bias[...] for block in blocks]).astype(shifts.dtype)

    def dropout_keys(self, rngs: nnx.Rngs) -> Callable[[], DropoutKey]:
        return iter(rngs.dropout.many(len(self._blocks()))).__next__

    def _blocks(self) -> list[Any]:
        stages = [*self.down, *self.up]
        return [self.mid1, self.mid2, *(block for stage in stages for block in stage.blocks)]
