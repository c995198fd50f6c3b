"""A transformer on pixels: DiT (Peebles and Xie 2022, arXiv:2212.09748), applied to patches of the image itself.

Where a patch has as many values as the network is wide, or more, use model.kind='x0': images lie near a manifold of few
dimensions, which a narrow network can represent, but noise, and with it ε and v, fills all dimensions of a patch, and
their prediction fails (JiT, arXiv:2511.13720). For small patches any kind will do.

The blocks are DiT's with adaLN-Zero. Its one addition is dropout, which DiT does not have.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from diffusion.networks.embedding import Embedding, Label, time_embedding
from diffusion.networks.unet import DropoutKey, Images, fan_avg, zeros

Tokens = Float[Array, 'B N D']  # one for each patch, row by row
Patches = Float[Array, 'B N P']  # pixels of each patch, row by row, channels last

LEVEL_DIM = 256  # width of the embedding of the noise level before its first layer
STD = 0.02  # standard deviation of the initial embeddings of level and class

# The frequencies of DiT's level embedding and of its position embedding are 10000^(−i/half), without a shift.
DIT_ORDER, MAE_ORDER = ('cos_sin', 0), ('sin_cos', 0)


def to_patches(x: Images, size: int) -> Patches:
    """Cut images into patches of size×size pixels."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


def to_images(patches: Patches, size: int) -> Images:
    """Put the patches of square images together: the inverse of `to_patches`."""
    batch, count, values = patches.shape
    side = round(count**0.5)
    x = patches.reshape(batch, side, side, size, size, values // size**2)
    return x.swapaxes(2, 3).reshape(batch, side * size, side * size, -1)


def position_embedding(side: int, dim: int) -> Float[Array, 'side*side dim']:
    """Embed the positions of side×side patches: the column in the first half, the row in the second, each sin ‖ cos.

    This is the fixed embedding of MAE (He et al. 2021, arXiv:2111.06377, appendix A.1), which DiT uses.
    """
    positions = time_embedding(jnp.arange(side), dim // 2, *MAE_ORDER)
    return jnp.concatenate([jnp.tile(positions, (side, 1)), jnp.repeat(positions, side, axis=0)], axis=1)


def modulate(x: Tokens, shift: Float[Array, 'B 1 D'], scale: Float[Array, 'B 1 D']) -> Tokens:
    """LayerNorm(x)·(1 + scale) + shift; the norm is computed in float32 and has no parameters of its own."""
    return jax.nn.standardize(x, epsilon=1e-6) * (1 + scale) + shift


class Block(nnx.Module):
    """x + gate·attention(modulate(x)), then x + gate·mlp(modulate(x)) (DiT, figure 3: adaLN-Zero).

    Shifts, scales and gates are a linear function of silu(emb). It starts at zero, so that the block is the identity.
    """

    def __init__(self, channels: int, *, head_channels: int, dropout: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        layer: dict[str, Any] = dict(kernel_init=fan_avg, dtype=dtype, rngs=rngs)
        self.heads = channels // (head_channels or channels)
        self.modulation = nnx.Linear(channels, 6 * channels, **layer | dict(kernel_init=zeros))
        self.qkv = nnx.Linear(channels, 3 * channels, **layer)
        self.out = nnx.Linear(channels, channels, **layer)
        self.mlp1 = nnx.Linear(channels, 4 * channels, **layer)
        self.dropout = nnx.Dropout(dropout)
        self.mlp2 = nnx.Linear(4 * channels, channels, **layer)

    def __call__(self, x: Tokens, emb: Embedding, dropout_key: DropoutKey = None) -> Tokens:
        modulation = self.modulation(nnx.silu(emb))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        x += gate1 * self.attention(modulate(x, shift1, scale1))
        h = nnx.gelu(self.mlp1(modulate(x, shift2, scale2)), approximate=True)
        h = self.dropout(h, deterministic=dropout_key is None, rngs=dropout_key)
        return x + gate2 * self.mlp2(h)

    def attention(self, x: Tokens) -> Tokens:
        """Self-attention over all patches."""
        batch, count, channels = x.shape
        heads = (batch, count, 3, self.heads, channels // self.heads)
        query, key, value = jnp.unstack(self.qkv(x).reshape(heads), axis=2)
        return self.out(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))


class DiT(nnx.Module):
    """The network: (x_t (B, H, W, C), t (B,)) → (B, H, W, C), or (B, H, W, out_channels), float32.

    A conditional one also takes the classes of the images; their embedding is added to that of the levels.
    """

    def __init__(
        self,
        *,
        image_size: int,
        image_channels: int,
        channels: int,
        patch_size: int,
        depth: int,
        dropout: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        head_channels: int = 0,
        remat: bool = False,
        num_classes: int = 0,
        out_channels: int = 0,
    ):
        """Make the network with initial parameters.

        Args:
            image_size: H and W, a multiple of `patch_size`.
            image_channels: C.
            channels: width, a multiple of 4.
            patch_size: height and width of a patch, in pixels. Half of it makes four times as many patches.
            depth: number of blocks.
            dropout: probability, in [0, 1), in the hidden layer of each MLP.
            dtype: of matmuls. Norms, softmax, the sums between blocks, parameters and output are float32.
            rngs: random streams; 'params' gives the initial parameters.
            head_channels: channels of each attention head, which divide `channels`. 0 means one head.
            remat: whether the backward pass recomputes the activations of each block.
            num_classes: number of classes; 0 makes the network unconditional.
            out_channels: channels of the output, 2·C if the variance is learned; 0 means C.

        Raises:
            ValueError: sizes do not fit together; the message names them.
        """
        _check(image_size, channels, patch_size, depth, dropout, head_channels)
        layer: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        normal: dict[str, Any] = layer | dict(kernel_init=nnx.initializers.normal(STD))
        zero: dict[str, Any] = layer | dict(kernel_init=zeros)
        values = patch_size**2
        self.patch_size, self.remat = patch_size, remat
        self.time1 = nnx.Linear(LEVEL_DIM, channels, **normal)
        self.time2 = nnx.Linear(channels, channels, **normal)
        self.label = Label(num_classes, channels, std=STD, **layer) if num_classes else None
        self.patches_in = nnx.Linear(values * image_channels, channels, kernel_init=fan_avg, **layer)
        block: dict[str, Any] = dict(head_channels=head_channels, dropout=dropout, **layer)
        self.blocks = nnx.List([Block(channels, **block) for _ in range(depth)])
        self.modulation_out = nnx.Linear(channels, 2 * channels, **zero)
        self.patches_out = nnx.Linear(channels, values * (out_channels or image_channels), **zero)

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
        emb = self.time2(nnx.silu(self.time1(time_embedding(t, LEVEL_DIM, *DIT_ORDER))))
        if self.label is not None:
            emb += self.label(jnp.full(t.shape, -1) if labels is None else labels)

        def run(block, x, emb, dropout_key):
            return block(x, emb, dropout_key)

        tokens = self.patches_in(to_patches(x, self.patch_size))
        tokens += position_embedding(x.shape[1] // self.patch_size, tokens.shape[-1])  # float32 from here on
        for block in self.blocks:
            key = None if deterministic else rngs.dropout()  # type: ignore[union-attr]
            tokens = (jax.checkpoint(run) if self.remat else run)(block, tokens, emb, key)
        shift, scale = jnp.split(self.modulation_out(nnx.silu(emb))[:, None], 2, axis=-1)
        patches = self.patches_out(modulate(tokens, shift, scale))
        return to_images(patches.astype(jnp.float32), self.patch_size)


def _check(image_size, channels, patch_size, depth, dropout, head_channels):
    """Raise ValueError if sizes do not fit together."""
    if patch_size < 1 or depth < 1:
        raise ValueError(f'patch_size is {patch_size} and depth is {depth}, but both must be at least 1')
    if not 0 <= dropout < 1:
        raise ValueError(f'dropout is {dropout}, but must lie in [0, 1)')
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(f'image_size is {image_size}, which is not divisible by patch_size = {patch_size}')
    if channels < 4 or channels % 4:
        raise ValueError(f'channels is {channels}, but the position embedding needs a multiple of 4')
    if head_channels and channels % head_channels:
        raise ValueError(f'channels = {channels} is not divisible by head_channels = {head_channels}')
