"""The U-Net for CPUs: other convolutions, norms and attention, and a backward pass that keeps less."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.networks import unet
from diffusion.networks.cpu.conv import conv
from diffusion.networks.cpu.order import LARGE, in_order, recomputed
from diffusion.networks.embedding import Embedding
from diffusion.networks.norm import GroupNorm
from diffusion.networks.unet import DropoutKey, Images


class Conv(nnx.Conv):
    """A convolution by the fastest algorithm for its shape."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, conv_general_dilated=conv, **options)


class Upsample(unet.Upsample):
    """Upsampling that never stores the repeated pixels."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, conv_general_dilated=functools.partial(conv, doubled=True), **options)

    __call__ = nnx.Conv.__call__  # type: ignore[assignment]


def _activated_conv(norm, conv, x, *, training, mask=None, keep=1.0):
    """conv(dropout(silu(norm(x)))), where `mask` has a bit for each element, packed along the channels: 1 is kept.

    In training, the backward pass of a large x keeps only x and recomputes the rest.
    """
    graph, state = nnx.split(conv)
    x = x.astype(jnp.float32)  # so that the gradients of both uses of x are added before they are rounded

    def run(x, given, mask):
        (factor, offset), state = given
        h = nnx.silu(x * factor + offset)
        if mask is not None:
            h = jnp.where(jnp.unpackbits(mask, axis=-1, count=h.shape[-1]), h / keep, 0)
        return nnx.merge(graph, state)(h)

    if training and x.size > LARGE:
        run = recomputed(run)
    return run(x, (norm.affine(x), state), mask)


class ResBlock(unet.ResBlock):
    """The block, with a bit-packed dropout mask: XLA would keep 64 random bits per element for the backward pass."""

    Conv = Conv
    GroupNorm = GroupNorm

    def __call__(self, x: Images, emb: Embedding, dropout_key: DropoutKey = None) -> Images:
        training, rate = dropout_key is not None, self.dropout.rate
        h = _activated_conv(self.norm1, self.conv1, x, training=training)
        h += self.time(nnx.silu(emb))[:, None, None]
        mask = None
        if dropout_key is not None and rate:
            mask = jnp.packbits(jax.random.bernoulli(dropout_key, 1 - rate, h.shape), axis=-1)
        h = _activated_conv(self.norm2, self.conv2, h, training=training, mask=mask, keep=1 - rate)
        return (x if self.shortcut is None else self.shortcut(x)) + h


class Attention(unet.Attention):
    """Attention with two matrices instead of four, which is possible if there is one head.

        logits = (h·Wq + bq)·(h·Wk + bk)ᵀ/√C = (h·WqWkᵀ + bq·Wkᵀ)·hᵀ/√C + a term that is equal for all keys
        output = (softmax(logits)·(h·Wv + bv))·Wo + bo = (softmax(logits)·h)·WvWo + bv·Wo + bo

    The softmax does not depend on the common term, so nothing depends on bk.
    """

    GroupNorm = GroupNorm

    def __call__(self, x: Images) -> Images:
        if self.heads > 1:
            return super().__call__(x)
        batch, height, width, channels = x.shape
        dtype = self.query.dtype
        h = self.norm(x).reshape(batch, height * width, channels).astype(dtype)
        queries = _affine(h, self.query, self.key.kernel[...].T)
        logits = jnp.einsum('btc,bsc->bts', queries, h, preferred_element_type=jnp.float32) / math.sqrt(channels)
        mean = jnp.einsum('bts,bsc->btc', jax.nn.softmax(logits).astype(dtype), h)
        assert self.out.bias is not None
        out = _affine(mean, self.value, self.out.kernel[...]) + self.out.bias[...].astype(dtype)
        return x + out.reshape(x.shape)


def _affine(x, linear, matrix):
    """(x·W + b)·matrix, where the product W·matrix is computed first and then rounded to x's type.

    x is reshaped to one matrix, so that the gradient of W·matrix is a plain matrix product.
    """
    product = (linear.kernel[...] @ matrix).astype(x.dtype)
    out = (x.reshape(-1, x.shape[-1]) @ product).reshape(*x.shape[:-1], matrix.shape[-1])
    return out + (linear.bias[...] @ matrix).astype(x.dtype)


class Stage(unet.Stage):
    """The blocks of one resolution, with a backward pass in an order that needs little memory."""

    def apply(self, i: int, inputs: Sequence[Images], emb: Embedding, dropout_key: DropoutKey) -> Images:
        if dropout_key is None:
            return super().apply(i, inputs, emb, dropout_key)
        graph, state = nnx.split((self.blocks[i], self.attentions[i] if self.attentions else None))

        def run(inputs, given, dropout_key):
            state, emb = given
            block, attention = nnx.merge(graph, state)
            x = block(jnp.concatenate(inputs, axis=-1), emb, dropout_key)
            return attention(x) if attention else x

        if self.remat:
            run = recomputed(run)
        if jax.device_count() == 1:  # else each block's gradients would be reduced over devices separately
            run = in_order(run)
        return run(inputs, (state, emb), dropout_key)


class UNet(unet.UNet):
    """The U-Net made of the parts above."""

    Conv = Conv
    Upsample = Upsample
    GroupNorm = GroupNorm
    ResBlock = ResBlock
    Attention = Attention
    Stage = Stage
