"""The U-Net for GPUs: fewer kernels, which read and write less, and less that is kept for the backward pass.

Normalized inputs of convolutions and products are not kept. The backward pass computes them again, from the activations
before the norm, which it reads for their gradient anyway.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Num

from diffusion.networks import unet
from diffusion.networks.embedding import Embedding
from diffusion.networks.norm import GroupNorm
from diffusion.networks.unet import DropoutKey, Images


def _convolve(layer, norm, x, *, shift=None, mask=None, keep=1.0):
    """Return the convolution, of stride 1 and without its bias, of dropout(silu(norm(x + shift))).

    x + shift is never computed, because that, and its gradient, would be passes over all activations.

    Args:
        layer: the convolution.
        norm: the norm.
        x: (B, H, W, C).
        shift: (B, C), or None.
        mask: (B, H, W, C) bool, what dropout keeps; None for no dropout.
        keep: the fraction that it keeps.
    """
    factor, offset = norm.affine(x.astype(jnp.float32), None if shift is None else shift.astype(jnp.float32))

    def run(x, factor, offset, kernel, mask):
        h = nnx.silu(x.astype(jnp.float32) * factor + offset)
        if mask is not None:
            h = jnp.where(mask, h / keep, 0)
        h = h.astype(kernel.dtype)
        return jax.lax.conv_general_dilated(h, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    return jax.checkpoint(run)(x, factor, offset, layer.kernel[...].astype(layer.dtype), mask)


def _side_by_side(layers: Sequence[nnx.Linear]) -> tuple[jax.Array, jax.Array]:
    """Return the kernels of linear layers of one input, concatenated, and their biases: one product instead of many."""
    kernels, biases = zip(*((layer.kernel[...], layer.bias[...]) for layer in layers), strict=True)  # type: ignore[index]
    dtype = layers[0].dtype
    return jnp.concatenate(kernels, axis=1).astype(dtype), jnp.concatenate(biases).astype(dtype)


class ResBlock(unet.ResBlock):
    """The block with norms and activations in few passes. `emb` is what `UNet.embed` returns, of all blocks."""

    GroupNorm = GroupNorm
    start: int  # index of this block's first channel in `emb`

    def __call__(self, x: Images, emb: Embedding, dropout_key: DropoutKey = None) -> Images:
        h = _convolve(self.conv1, self.norm1, x)
        shift, keep, mask = emb[:, self.start : self.start + self.time.out_features], 1 - self.dropout.rate, None
        if dropout_key is not None and keep < 1:
            mask = jax.random.bernoulli(dropout_key, keep, h.shape)
        h = _convolve(self.conv2, self.norm2, h, shift=shift, mask=mask, keep=keep)
        h += self.conv2.bias[...].astype(h.dtype)  # type: ignore[index]
        return (x if self.shortcut is None else self.shortcut(x)) + h


class Attention(unet.Attention):
    """Attention with the norm in few passes, and queries, keys and values by one product."""

    GroupNorm = GroupNorm

    def project(self, x: Images) -> Sequence[Images]:
        factor, offset = self.norm.affine(x.astype(jnp.float32))  # type: ignore[attr-defined]
        kernel, bias = _side_by_side([self.query, self.key, self.value])

        def run(x, factor, offset, kernel):
            return (x.astype(jnp.float32) * factor + offset).astype(kernel.dtype) @ kernel

        return jnp.split(jax.checkpoint(run)(x, factor, offset, kernel) + bias, 3, axis=-1)


class UNet(unet.UNet):
    """The U-Net made of the parts above."""

    GroupNorm = GroupNorm
    ResBlock = ResBlock
    Attention = Attention

    # The keys of a config that a network takes are read from its signature, so it has to be that of the plain network.
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
        kernel, bias = _side_by_side([block.time for block in blocks])
        shifts = nnx.silu(super().embed(t, labels)).astype(kernel.dtype) @ kernel + bias
        return shifts + jnp.concatenate([block.conv1.bias[...] for block in blocks]).astype(shifts.dtype)

    def __call__(
        self,
        x: Images,
        t: Num[Array, 'B'],
        labels: Int[Array, 'B'] | None = None,
        *,
        deterministic: bool = True,
        rngs: Any = None,
    ) -> Images:
        """Apply the network, with the keys of all blocks drawn at once."""
        if not deterministic:
            rngs = types.SimpleNamespace(dropout=iter(rngs.dropout.many(len(self._blocks()))).__next__)
        return super().__call__(x, t, labels, deterministic=deterministic, rngs=rngs)

    def _blocks(self) -> list[Any]:
        stages = [*self.down, *self.up]
        return [self.mid1, self.mid2, *(block for stage in stages for block in stage.blocks)]
