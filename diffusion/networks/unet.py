"""The U-Net of DDPM (Ho et al. 2020, arXiv:2006.11239, appendix B), as in their code.

At a resolution with attention, every block of encoder and decoder is followed by attention. The last layer of every
residual branch starts at zero. The U-Nets of diffusers' training script have the same parameters, but use them
differently: the order and the frequencies of the time embedding, the padding before downsampling, the number of
attention heads and the ε of GroupNorm are not DDPM's. `UNet` has an argument for each of these choices; the default is
DDPM's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Num

from diffusion.networks.checks import check_heads, check_sizes
from diffusion.networks.embedding import Embedding, Label, time_embedding

Images = Float[Array, 'B H W C']
DropoutKey = Key[Array, ''] | None  # None: no dropout

fan_avg = nnx.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')
zeros = nnx.initializers.zeros_init()


class GroupNorm(nnx.GroupNorm):
    """Group normalization (Wu and He 2018, arXiv:1803.08494), computed and returned in float32."""

    def __call__(self, x: Images) -> Images:  # type: ignore[override]
        return super().__call__(x.astype(jnp.float32))


class Upsample(nnx.Conv):
    """Repeat each pixel 2×2 times, then convolve."""

    def __call__(self, x: Images) -> Float[Array, 'B 2*H 2*W C']:  # type: ignore[override]
        return super().__call__(x.repeat(2, axis=1).repeat(2, axis=2))


class ResBlock(nnx.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + linear(silu(emb))))))."""

    Conv = nnx.Conv
    GroupNorm = GroupNorm

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        *,
        groups: int,
        norm_epsilon: float = 1e-6,
        dropout: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        layer: dict[str, Any] = dict(kernel_init=fan_avg, dtype=dtype, rngs=rngs)
        self.norm1 = self.GroupNorm(in_channels, groups, epsilon=norm_epsilon, rngs=rngs)
        self.conv1 = self.Conv(in_channels, out_channels, (3, 3), **layer)
        self.time = nnx.Linear(emb_dim, out_channels, **layer)
        self.norm2 = self.GroupNorm(out_channels, groups, epsilon=norm_epsilon, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.conv2 = self.Conv(out_channels, out_channels, (3, 3), **layer | dict(kernel_init=zeros))
        self.shortcut = self.Conv(in_channels, out_channels, (1, 1), **layer) if in_channels != out_channels else None

    def __call__(self, x: Images, emb: Embedding, dropout_key: DropoutKey = None) -> Images:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h += self.time(nnx.silu(emb))[:, None, None]
        h = self.dropout(nnx.silu(self.norm2(h)), deterministic=dropout_key is None, rngs=dropout_key)
        h = self.conv2(h)
        return (x if self.shortcut is None else self.shortcut(x)) + h


class Attention(nnx.Module):
    """x + linear(attention(norm(x))): self-attention over all pixels."""

    GroupNorm = GroupNorm

    def __init__(
        self,
        channels: int,
        *,
        groups: int,
        norm_epsilon: float = 1e-6,
        head_channels: int = 0,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        layer: dict[str, Any] = dict(kernel_init=fan_avg, dtype=dtype, rngs=rngs)
        self.heads = channels // (head_channels or channels)
        self.norm = self.GroupNorm(channels, groups, epsilon=norm_epsilon, rngs=rngs)
        self.query = nnx.Linear(channels, channels, **layer)
        self.key = nnx.Linear(channels, channels, **layer)
        self.value = nnx.Linear(channels, channels, **layer)
        self.out = nnx.Linear(channels, channels, **layer | dict(kernel_init=zeros))

    def __call__(self, x: Images) -> Images:
        batch, height, width, channels = x.shape
        heads = (batch, height * width, self.heads, channels // self.heads)
        query, key, value = (part.reshape(heads) for part in self.project(x))
        return x + self.out(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))

    def project(self, x: Images) -> Sequence[Images]:
        """Return the queries, keys and values of normalized activations."""
        h = self.norm(x)
        return [layer(h) for layer in (self.query, self.key, self.value)]


class Stage(nnx.Module):
    """The blocks of one resolution, of the encoder or the decoder."""

    def __init__(
        self,
        blocks: Sequence[ResBlock],
        attentions: Sequence[Attention],
        resample: nnx.Conv | None,
        remat: bool,
    ):
        self.blocks = nnx.List(blocks)
        self.attentions = nnx.List(attentions)  # one per block, or none
        self.resample = resample  # leads to the next resolution, if there is one
        self.remat = remat

    def apply(self, i: int, inputs: Sequence[Images], emb: Embedding, dropout_key: DropoutKey) -> Images:
        """Apply block i, and its attention if it has one.

        Args:
            i: the index of the block.
            inputs: activations, which are concatenated along the channels.
            emb: the embedded noise levels.
            dropout_key: typed PRNG key; None for no dropout.

        Returns:
            The activations after the block.
        """

        def run(inputs, emb, dropout_key):
            x = self.blocks[i](jnp.concatenate(inputs, axis=-1), emb, dropout_key)
            return self.attentions[i](x) if self.attentions else x

        return (jax.checkpoint(run) if self.remat else run)(inputs, emb, dropout_key)

    def leave(self, x: Images, emb: Embedding, key: Callable[[], DropoutKey]) -> Images:
        """Change the size of the activations to that of the next resolution.

        Args:
            x: the activations after the last block.
            emb: the embedded noise levels, for stages that need them here.
            key: returns a new typed PRNG key, or None for no dropout.

        Returns:
            The activations at the next resolution.
        """
        return self.resample(x)  # type: ignore[misc]


class UNet(nnx.Module):
    """The network: (x_t (B, H, W, C), t (B,)) → (B, H, W, C), or (B, H, W, out_channels), float32.

    A conditional one also takes the classes of the images; their embedding is added to that of the levels (Dhariwal and
    Nichol 2021, arXiv:2105.05233, §3).

    The classes of its parts are attributes, which a subclass may replace.
    """

    Conv: Callable = nnx.Conv
    Upsample: Callable = Upsample
    GroupNorm: Callable = GroupNorm
    ResBlock: Callable = ResBlock
    Attention: Callable = Attention
    Stage: Callable = Stage

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
        head_channels: int = 0,
        norm_epsilon: float = 1e-6,
        downsample_padding: int = 0,
        mid_attention: bool = True,
        embedding_order: str = 'sin_cos',
        embedding_shift: int = 1,
        num_classes: int = 0,
        out_channels: int = 0,
    ):
        """Make the network with initial parameters.

        Args:
            image_size: H and W, a multiple of 2^(len(multipliers) − 1); decides which blocks have attention.
            image_channels: C.
            channels: width that the multipliers multiply, and width of the first convolution.
            multipliers: width at each resolution, in units of `channels`; each resolution is half of the one before.
            num_blocks: residual blocks at each resolution of the encoder; the decoder has one more.
            attention_resolutions: image sizes, in pixels, at which blocks are followed by attention.
            dropout: probability, in [0, 1).
            groups: groups of GroupNorm; their number divides `channels`.
            dtype: of convolutions and matmuls. Norms, softmax, parameters and output are float32.
            rngs: random streams; 'params' gives the initial parameters.
            remat: whether the backward pass recomputes the activations of each block of encoder and decoder.
            head_channels: channels of each attention head; they divide each width that has attention. 0 means one head.
            norm_epsilon: ε of GroupNorm.
            downsample_padding: pixels of zeros before each axis when the size is halved, 0 or 1; after it is one.
            mid_attention: whether attention is between the two blocks in the middle.
            embedding_order: see `time_embedding`.
            embedding_shift: see `time_embedding`.
            num_classes: number of classes; 0 makes the network unconditional.
            out_channels: channels of the output, 2·C if the variance is learned; 0 means C.

        Raises:
            ValueError: sizes do not fit together; the message names them.
        """
        check_sizes(image_size, channels, multipliers, num_blocks, attention_resolutions, dropout, groups)
        if channels % groups:  # the width of the first convolution, which the multipliers do not change
            raise ValueError(f'channels = {channels} is not divisible by groups = {groups}')
        parts = {'head_channels': head_channels}
        check_heads(image_size, channels, multipliers, attention_resolutions, mid_attention, parts)
        widths = [channels * m for m in multipliers]
        sizes = [image_size >> level for level in range(len(widths))]
        emb_dim = 4 * channels
        layer: dict[str, Any] = dict(kernel_init=fan_avg, dtype=dtype, rngs=rngs)
        norm: dict[str, Any] = dict(groups=groups, norm_epsilon=norm_epsilon, dtype=dtype, rngs=rngs)
        block: dict[str, Any] = dict(dropout=dropout, **norm)
        attention: dict[str, Any] = dict(head_channels=head_channels, **norm)

        def stage(size, in_channels, width, resample):
            blocks = [self.ResBlock(n, width, emb_dim, **block) for n in in_channels]
            attentions = [self.Attention(width, **attention) for _ in blocks if size in attention_resolutions]
            return self.Stage(blocks, attentions, resample, remat)

        self.embedding = channels, embedding_order, embedding_shift
        self.time1 = nnx.Linear(channels, emb_dim, **layer)
        self.time2 = nnx.Linear(emb_dim, emb_dim, **layer)
        self.conv_in = self.Conv(image_channels, channels, (3, 3), **layer)

        skips = [channels]  # widths of what the encoder keeps for the decoder
        down = []
        for size, width in zip(sizes, widths, strict=True):
            last = size == sizes[-1]
            downsample: dict[str, Any] = dict(strides=2, padding=((downsample_padding, 1),) * 2)
            resample = None if last else self.Conv(width, width, (3, 3), **downsample, **layer)
            down.append(stage(size, [skips[-1]] + [width] * (num_blocks - 1), width, resample))
            skips += [width] * (num_blocks if last else num_blocks + 1)
        self.down = nnx.List(down)

        self.mid1 = self.ResBlock(width, width, emb_dim, **block)
        self.mid_attention = self.Attention(width, **attention) if mid_attention else None
        self.mid2 = self.ResBlock(width, width, emb_dim, **block)

        up, below = [], width
        for size, width in zip(reversed(sizes), reversed(widths), strict=True):
            in_channels = [previous + skips.pop() for previous in [below] + [width] * num_blocks]
            resample = None if size == image_size else self.Upsample(width, width, (3, 3), **layer)
            up.append(stage(size, in_channels, width, resample))
            below = width
        self.up = nnx.List(up)

        self.norm_out = self.GroupNorm(width, groups, epsilon=norm_epsilon, rngs=rngs)
        self.conv_out = self.Conv(width, out_channels or image_channels, (3, 3), **layer | dict(kernel_init=zeros))
        self.label = Label(num_classes, emb_dim, dtype=dtype, rngs=rngs) if num_classes else None

    def __call__(
        self,
        x: Images,
        t: Num[Array, 'B'],
        labels: Int[Array, 'B'] | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Images:
        """Apply the network.

        Args:
            x: noisy images.
            t: noise levels.
            labels: classes, of a conditional network; −1 is no class. None is no class for all images.
            deterministic: whether dropout is off.
            rngs: random streams; each block draws a key from 'dropout'. Needed unless `deterministic`.

        Returns:
            The prediction, of the shape of x but for `out_channels`. The loss decides what it predicts.
        """

        key = (lambda: None) if deterministic else rngs.dropout  # type: ignore[union-attr]
        emb = self.embed(t, labels)
        x = self.conv_in(x)
        skips = [x]
        for stage in self.down:
            for i in range(len(stage.blocks)):
                x = stage.apply(i, [x], emb, key())
                skips.append(x)
            if stage.resample is not None:
                x = stage.leave(x, emb, key)
                skips.append(x)
        x = self.mid1(x, emb, key())
        if self.mid_attention is not None:
            x = self.mid_attention(x)
        x = self.mid2(x, emb, key())
        for stage in self.up:
            for i in range(len(stage.blocks)):
                x = stage.apply(i, [x, skips.pop()], emb, key())
            if stage.resample is not None:
                x = stage.leave(x, emb, key)
        return self.conv_out(nnx.silu(self.norm_out(x))).astype(jnp.float32)

    def embed(self, t: Num[Array, 'B'], labels: Int[Array, 'B'] | None) -> Embedding:
        """Embed noise levels and classes, see `__call__`, for all residual blocks."""
        emb = self.time2(nnx.silu(self.time1(time_embedding(t, *self.embedding))))
        if self.label is not None:
            emb += self.label(jnp.full(t.shape, -1) if labels is None else labels)
        return emb
