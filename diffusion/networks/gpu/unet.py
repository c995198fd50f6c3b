"""The U-Net for GPUs: fewer kernels, which read and write less."""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.networks import unet
from diffusion.networks.norm import GroupNorm
from diffusion.networks.unet import DropoutKey, Embedding, Images


def _activated(norm, x):
    """silu(norm(x)). The backward pass computes it again from x and keeps nothing in float32."""
    factor, offset = norm.affine(x.astype(jnp.float32))

    def run(x, factor, offset):
        return nnx.silu(x.astype(jnp.float32) * factor + offset)

    return jax.checkpoint(run, prevent_cse=False)(x, factor, offset)


class ResBlock(unet.ResBlock):
    """The block with its norms and activations in few passes."""

    GroupNorm = GroupNorm

    def __call__(self, x: Images, emb: Embedding, dropout_key: DropoutKey = None) -> Images:
        h = self.conv1(_activated(self.norm1, x))
        h += self.time(nnx.silu(emb))[:, None, None]
        h = self.dropout(_activated(self.norm2, h), deterministic=dropout_key is None, rngs=dropout_key)
        h = self.conv2(h)
        return (x if self.shortcut is None else self.shortcut(x)) + h


class Attention(unet.Attention):
    """Attention with the norm in few passes."""

    GroupNorm = GroupNorm


class UNet(unet.UNet):
    """The U-Net made of the parts above."""

    GroupNorm = GroupNorm
    ResBlock = ResBlock
    Attention = Attention
