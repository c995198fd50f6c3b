"""OpenAI's U-Net: improved DDPM (Nichol and Dhariwal 2021, arXiv:2102.09672) and ADM (Dhariwal and Nichol 2021,
arXiv:2105.05233, §3).

It differs from DDPM's U-Net in that the embedding may scale and shift the second norm of each block, the size may be
changed by residual blocks instead of convolutions, attention has several heads, and the output may have more channels
than the image, for learned variances. The default arguments are those of their code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diffusion.networks import unet
from diffusion.networks.checks import check_heads, check_sizes
from diffusion.networks.embedding import Embedding, Label
from diffusion.networks.unet import (
    Attention,
    DropoutKey,
    GroupNorm,
    Images,
    Upsample,
    fan_avg,
    zeros,
)


def halve(x: Images) -> Float[Array, 'B H/2 W/2 C']:
    """Average each 2×2 pixels."""
    return nnx.avg_pool(x, (2, 2), strides=(2, 2))


def double(x: Images) -> Float[Array, 'B 2*H 2*W C']:
    """Repeat each pixel 2×2 times."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


RESIZE = {'same': lambda x: x, 'half': halve, 'double': double}


class ResBlock(nnx.Module):
    """resize(x) + conv(dropout(silu(embedded))), with h = conv(resize(silu(norm(x)))) and (a, b) = linear(silu(emb)).

    `embedded` is norm(h)·(1 + a) + b with `scale_shift_norm`, and norm(h + b) without it, where there is no a.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        *,
        resize: str = 'same',
        scale_shift_norm: bool,
        groups: int,
        norm_epsilon: float,
        dropout: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        layer: dict[str, Any] = dict(kernel_init=fan_avg, dtype=dtype, rngs=rngs)
        self.resize = resize
        self.scale_shift_norm = scale_shift_norm
        self.norm1 = GroupNorm(in_channels, groups, epsilon=norm_epsilon, rngs=rngs)
        self.conv1 = nnx.Conv(in_channels, out_channels, (3, 3), **layer)
        self.time = nnx.Linear(emb_dim, (1 + scale_shift_norm) * out_channels, **layer)
        self.norm2 = GroupNorm(out_channels, groups, epsilon=norm_epsilon, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.conv2 = nnx.Conv(out_channels, out_channels, (3, 3), **layer | dict(kernel_init=zeros))
        self.shortcut = nnx.Conv(in_channels, out_channels, (1, 1), **layer) if in_channels != out_channels else None

    def __call__(self, x: Images, emb: Embedding, dropout_key: DropoutKey = None) -> Images:
        resize = RESIZE[self.resize]
        h = self.conv1(resize(nnx.silu(self.norm1(x))))
        emb = self.time(nnx.silu(emb))[:, None, None]
        if self.scale_shift_norm:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.dropout(nnx.silu(h), deterministic=dropout_key is None, rngs=dropout_key)
        x = resize(x)
        return (x if self.shortcut is None else self.shortcut(x)) + self.conv2(h)


class Stage(unet.Stage):
    """The blocks of one resolution, and a residual block or a convolution that leads to the next."""

    def leave(self, x: Images, emb: Embedding, key: Callable[[], DropoutKey]) -> Images:
        dropout_key = key()
        if not isinstance(self.resample, ResBlock):
            return self.resample(x)  # type: ignore[misc]
        return (jax.checkpoint(self.resample.__call__) if self.remat else self.resample)(x, emb, dropout_key)


class ADM(unet.UNet):
    """The network: (x_t (B, H, W, C), t (B,)) → (B, H, W, out_channels), float32.

    The classes of the images, if there are any, have an embedding that is added to that of the levels. OpenAI's
    conditional networks have none for "no class", which this one has.
    """

    def __init__(
        self,
        *,
        image_size: int,
        image_channels: int,
        channels: int,
        multipliers: Sequence[int],
        num_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float,
        groups: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        remat: bool = False,
        num_heads: int = 0,
        head_channels: int = 0,
        scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        updown_levels: str = 'all',
        norm_epsilon: float = 1e-5,
        downsample_padding: int = 1,
        mid_attention: bool = True,
        embedding_order: str = 'cos_sin',
        embedding_shift: int = 0,
        num_classes: int = 0,
        out_channels: int = 0,
    ):
        """Make the network with initial parameters.

        Args:
            image_size: height and width of the images in pixels.
            image_channels: C.
            channels: width that the multipliers multiply, and width of the time embedding before its first layer.
            multipliers: width at each resolution, in units of `channels`; each resolution is half of the one before.
            num_blocks: residual blocks at each resolution of the encoder; the decoder has one more.
            attention_resolutions: image sizes, in pixels, at which blocks are followed by attention.
            dropout: probability, in [0, 1).
            groups: groups of GroupNorm; their number divides each width.
            dtype: of convolutions and matmuls. Norms, softmax, parameters and output are float32.
            rngs: random streams; 'params' gives the initial parameters.
            remat: whether the backward pass recomputes the activations of each block of encoder and decoder.
            num_heads: attention heads, if `head_channels` is 0; 0 means one head.
            head_channels: channels of each attention head; they divide each width that has attention.
            scale_shift_norm: whether the embedding scales and shifts the second norm of each block, or is added.
            resblock_updown: whether residual blocks change the size, by averages and repetition, or convolutions.
            updown_levels: at which resolutions `resblock_updown` has residual blocks: 'all', or those with 'attention'.
            norm_epsilon: ε of GroupNorm.
            downsample_padding: of the convolutions that change the size, see `unet.UNet`.
            mid_attention: whether attention is between the two blocks in the middle.
            embedding_order: see `time_embedding`.
            embedding_shift: see `time_embedding`.
            num_classes: number of classes; 0 makes the network unconditional.
            out_channels: channels of the output; 0 means C.

        Raises:
            ValueError: sizes do not fit together; the message names them.
        """
        check_sizes(image_size, channels, multipliers, num_blocks, attention_resolutions, dropout, groups)
        parts = {'head_channels': head_channels} if head_channels else {'num_heads': num_heads}
        check_heads(image_size, channels, multipliers, attention_resolutions, mid_attention, parts)
        widths = [channels * m for m in multipliers]
        sizes = [image_size >> level for level in range(len(widths))]
        attends = [size in attention_resolutions for size in sizes]
        by_blocks = [resblock_updown and (attended or updown_levels == 'all') for attended in attends]
        emb_dim = 4 * channels
        layer: dict[str, Any] = dict(kernel_init=fan_avg, dtype=dtype, rngs=rngs)
        norm: dict[str, Any] = dict(groups=groups, norm_epsilon=norm_epsilon, dtype=dtype, rngs=rngs)

        def block(in_channels, width, resize='same'):
            how = dict(scale_shift_norm=scale_shift_norm, dropout=dropout, **norm)
            return ResBlock(in_channels, width, emb_dim, resize=resize, **how)

        def attention(width):
            return Attention(width, head_channels=head_channels or width // (num_heads or 1), **norm)

        def stage(level, in_channels, resample):
            blocks = [block(n, widths[level]) for n in in_channels]
            return Stage(blocks, [attention(widths[level]) for _ in blocks if attends[level]], resample, remat)

        self.embedding = channels, embedding_order, embedding_shift
        self.time1 = nnx.Linear(channels, emb_dim, **layer)
        self.time2 = nnx.Linear(emb_dim, emb_dim, **layer)
        self.conv_in = nnx.Conv(image_channels, widths[0], (3, 3), **layer)

        skips = [widths[0]]  # widths of what the encoder keeps for the decoder
        last = len(widths) - 1
        down = []
        for level, width in enumerate(widths):
            resample = None
            if level < last and by_blocks[level]:
                resample = block(width, width, 'half')
            elif level < last:
                padding = ((downsample_padding, 1),) * 2
                resample = nnx.Conv(width, width, (3, 3), strides=2, padding=padding, **layer)
            down.append(stage(level, [skips[-1]] + [width] * (num_blocks - 1), resample))
            skips += [width] * (num_blocks + (level < last))
        self.down = nnx.List(down)

        width = widths[-1]
        self.mid1 = block(width, width)
        self.mid_attention = attention(width) if mid_attention else None
        self.mid2 = block(width, width)

        up, below = [], width
        for level, width in reversed(list(enumerate(widths))):
            in_channels = [previous + skips.pop() for previous in [below] + [width] * num_blocks]
            resample = None
            if level > 0 and by_blocks[level]:
                resample = block(width, width, 'double')
            elif level > 0:
                resample = Upsample(width, width, (3, 3), **layer)
            up.append(stage(level, in_channels, resample))
            below = width
        self.up = nnx.List(up)

        self.norm_out = GroupNorm(width, groups, epsilon=norm_epsilon, rngs=rngs)
        self.conv_out = nnx.Conv(width, out_channels or image_channels, (3, 3), **layer | dict(kernel_init=zeros))
        self.label = Label(num_classes, emb_dim, dtype=dtype, rngs=rngs) if num_classes else None
