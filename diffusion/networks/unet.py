"""The U-Net of DDPM (arXiv:2006.11239, appendix B), as Ho et al. wrote it and diffusers builds it.

What others do differently, here as in Ho's code: an attention after *each* decoder block of a level that
has one; stride-2 convolutions padded by (0, 1); sin before cos, with half−1, in the time embedding;
GroupNorm ε of 1e-6; one attention head; the last convolution of each branch starts at zero.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion.networks.conv import conv
from diffusion.networks.norm import GroupNorm
from diffusion.networks.order import in_order, recomputed

fan_avg = nnx.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')
zeros = nnx.initializers.zeros_init()
LARGE = 2**19  # numbers of a batch that takes longer to keep in memory, and fetch again, than to compute


def time_embedding(t, dim):
    """Sinusoids of the noise level: sin(t·ω_i) ‖ cos(t·ω_i), ω_i = 10000^(−i/(dim/2−1)).

    t: (B,) integer or real; dim: even, at least 4. Returns (B, dim) float32.
    """
    angles = t.astype(jnp.float32)[:, None] * _frequencies(dim)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def _frequencies(dim):
    half = dim // 2
    return jnp.exp(-math.log(10_000) / (half - 1) * jnp.arange(half, dtype=jnp.float32))


def advance(kernel):
    """The kernel of the layer behind `time_embedding`, turned so that the layer answers at t what it did at t+1.

        sin((t+1)ω) = sin tω·cos ω + cos tω·sin ω,    cos((t+1)ω) = cos tω·cos ω − sin tω·sin ω

    kernel: (dim, features). Returns (dim, features) float32, computed in float64.
    """
    half = len(kernel) // 2
    angles = np.asarray(_frequencies(len(kernel)), np.float64)
    sin, cos = np.sin(angles)[:, None], np.cos(angles)[:, None]
    of_sin, of_cos = np.asarray(kernel[:half], np.float64), np.asarray(kernel[half:], np.float64)
    return np.concatenate([cos * of_sin - sin * of_cos, sin * of_sin + cos * of_cos]).astype(np.float32)


def _conv(inputs, outputs, size=3, *, rngs, dtype, strides=1, padding='SAME', init=fan_avg, doubled=False):
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=strides,
        padding=padding,
        kernel_init=init,
        conv_general_dilated=functools.partial(conv, doubled=doubled),
        dtype=dtype,
        rngs=rngs,
    )


def _linear(inputs, outputs, *, rngs, dtype, init=fan_avg):
    return nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, rngs=rngs)


def _norm(channels, groups, *, rngs):
    return GroupNorm(channels, groups, epsilon=1e-6, rngs=rngs)


def _thrifty(run, x, training):
    """`run`, as of `recomputed`, for x: in training, on CPUs, only a large x itself is kept for the way back."""
    return recomputed(run) if training and x.size > LARGE and jax.default_backend() == 'cpu' else run


def _activated(norm, conv, x, *, training, mask=None, keep=1.0):
    """conv(dropout(silu(norm(x)))). mask: what dropout keeps, packed bits along the channels; keep: their share."""
    graph, state = nnx.split(conv)
    x = x.astype(jnp.float32)  # here, for the gradients of both its uses are added up before they are rounded

    def run(x, given, mask):
        (factor, offset), state = given
        h = nnx.silu(x * factor + offset)
        if mask is not None:
            h = jnp.where(jnp.unpackbits(mask, axis=-1, count=h.shape[-1]), h / keep, 0)
        return nnx.merge(graph, state)(h)

    return _thrifty(run, x, training)(x, (norm.affine(x), state), mask)


class ResBlock(nnx.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + linear(silu(emb))))))."""

    def __init__(self, inputs, outputs, embedding, *, groups, dropout, dtype, rngs):
        self.norm1 = _norm(inputs, groups, rngs=rngs)
        self.conv1 = _conv(inputs, outputs, rngs=rngs, dtype=dtype)
        self.time = _linear(embedding, outputs, rngs=rngs, dtype=dtype)
        self.norm2 = _norm(outputs, groups, rngs=rngs)
        self.dropout = dropout
        self.conv2 = _conv(outputs, outputs, rngs=rngs, dtype=dtype, init=zeros)
        self.shortcut = _conv(inputs, outputs, 1, rngs=rngs, dtype=dtype) if inputs != outputs else None

    def __call__(self, x, emb, dropout_key):
        training = dropout_key is not None
        h = _activated(self.norm1, self.conv1, x, training=training)
        h += self.time(nnx.silu(emb))[:, None, None]
        mask, keep = None, 1 - self.dropout
        if training and self.dropout:
            mask = jnp.packbits(jax.random.bernoulli(dropout_key, keep, h.shape), axis=-1)
        h = _activated(self.norm2, self.conv2, h, training=training, mask=mask, keep=keep)
        return (x if self.shortcut is None else self.shortcut(x)) + h


class Attention(nnx.Module):
    """x + linear(attention(norm(x))): one head over all pixels.

    With a single head the four layers are two, of the products of their matrices:

        logits = (h·Wq + bq)·(h·Wk + bk)ᵀ/√C = (h·WqWkᵀ + bq·Wkᵀ)·hᵀ/√C + what all keys have in common
        output = (softmax(logits)·(h·Wv + bv))·Wo + bo = (softmax(logits)·h)·WvWo + bv·Wo + bo

    and softmax does not depend on what its arguments have in common, nor anything on bk.
    """

    def __init__(self, channels, *, groups, dtype, rngs):
        self.dtype = dtype
        self.norm = _norm(channels, groups, rngs=rngs)
        self.query = _linear(channels, channels, rngs=rngs, dtype=dtype)
        self.key = _linear(channels, channels, rngs=rngs, dtype=dtype)
        self.value = _linear(channels, channels, rngs=rngs, dtype=dtype)
        self.out = _linear(channels, channels, rngs=rngs, dtype=dtype, init=zeros)

    def __call__(self, x, training):
        graph, state = nnx.split(self)
        return x + _thrifty(lambda x, state, _: nnx.merge(graph, state).branch(x), x, training)(x, state, None)

    def branch(self, x):
        batch, height, width, channels = x.shape
        h = self.norm(x).reshape(batch, height * width, channels).astype(self.dtype)
        queries = _affine(h, self.query, self.key.kernel[...].T)
        logits = jnp.einsum('btc,bsc->bts', queries, h, preferred_element_type=jnp.float32) / math.sqrt(channels)
        mean = jnp.einsum('bts,bsc->btc', jax.nn.softmax(logits).astype(self.dtype), h)
        out = _affine(mean, self.value, self.out.kernel[...]) + self.out.bias[...].astype(self.dtype)
        return out.reshape(x.shape)


def _affine(x, linear, matrix):
    """(x·W + b)·matrix, by the product W·matrix, which is rounded to the type of x only then.

    Of x as one matrix: its gradients are a matrix product then too, which XLA is slow at with several axes.
    """
    product = (linear.kernel[...] @ matrix).astype(x.dtype)
    out = (x.reshape(-1, x.shape[-1]) @ product).reshape(*x.shape[:-1], matrix.shape[-1])
    return out + (linear.bias[...] @ matrix).astype(x.dtype)


class Stage(nnx.Module):
    """The blocks of one resolution on the way down or up, each followed by an attention if there is one."""

    def __init__(self, blocks, attentions, resample, remat):
        self.blocks = nnx.List(blocks)
        self.attentions = nnx.List(attentions)  # as many as blocks, or none
        self.resample = resample  # the convolution that leads to the next resolution, if there is one
        self.remat = remat

    def block(self, i, inputs, emb, dropout_key):
        """Block i on its inputs, images that are put together channel by channel."""
        training = dropout_key is not None
        graph, state = nnx.split((self.blocks[i], self.attentions[i] if self.attentions else None))

        def run(inputs, given, dropout_key):
            state, emb = given
            block, attention = nnx.merge(graph, state)
            x = block(jnp.concatenate(inputs, axis=-1), emb, dropout_key)
            return x if attention is None else attention(x, training)

        if self.remat:
            run = recomputed(run)
        if training and jax.default_backend() == 'cpu' and jax.device_count() == 1:
            run = in_order(run)
        return run(inputs, (state, emb), dropout_key)


class UNet(nnx.Module):
    """(x_t (B, H, W, C), t (B,)) → (B, H, W, C) float32.

    image_size: H and W, a multiple of 2^(len(multipliers)−1), decides where the attentions go;
    image_channels: C; channels × multipliers: the width at each resolution, the finest first;
    num_blocks: residual blocks a resolution on the way down (one more on the way up);
    attention_resolutions: image sizes at which blocks are followed by attention;
    groups: of GroupNorm, a divisor of each width; dtype: of convolutions and matmuls (norms, softmax,
    parameters and output stay float32); remat: keep only the inputs of each block for the way back.

    Raises ValueError for sizes that do not fit, with the sizes that would.
    """

    def __init__(
        self,
        *,
        image_size,
        image_channels,
        channels,
        multipliers,
        num_blocks,
        attention_resolutions,
        dropout,
        groups,
        dtype,
        rngs,
        remat=False,
    ):
        _check(image_size, channels, multipliers, num_blocks, attention_resolutions, dropout, groups)
        widths = [channels * m for m in multipliers]
        sizes = [image_size >> level for level in range(len(widths))]
        embedding = 4 * channels
        args = dict(groups=groups, dtype=dtype, rngs=rngs)

        def stage(size, inputs, outputs, resample):
            blocks = [ResBlock(i, outputs, embedding, dropout=dropout, **args) for i in inputs]
            attentions = [Attention(outputs, **args) for _ in inputs if size in attention_resolutions]
            return Stage(blocks, attentions, resample, remat)

        self.channels = channels
        self.time1 = _linear(channels, embedding, rngs=rngs, dtype=dtype)
        self.time2 = _linear(embedding, embedding, rngs=rngs, dtype=dtype)
        self.conv_in = _conv(image_channels, channels, rngs=rngs, dtype=dtype)

        skips = [channels]  # widths of what the way down leaves for the way up
        down = []
        for level, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            last = level == len(widths) - 1
            resample = (
                None if last else _conv(width, width, strides=2, padding=((0, 1), (0, 1)), rngs=rngs, dtype=dtype)
            )
            down.append(stage(size, [skips[-1]] + [width] * (num_blocks - 1), width, resample))
            skips += [width] * (num_blocks if last else num_blocks + 1)
        self.down = nnx.List(down)

        self.mid1 = ResBlock(width, width, embedding, dropout=dropout, **args)
        self.mid_attention = Attention(width, **args)
        self.mid2 = ResBlock(width, width, embedding, dropout=dropout, **args)

        up, below = [], width
        for level, (size, width) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            inputs = [previous + skips.pop() for previous in [below] + [width] * num_blocks]
            resample = None if level == 0 else _conv(width, width, doubled=True, rngs=rngs, dtype=dtype)
            up.append(stage(size, inputs, width, resample))
            below = width
        self.up = nnx.List(up)

        self.norm_out = _norm(width, groups, rngs=rngs)
        self.conv_out = _conv(width, image_channels, rngs=rngs, dtype=dtype, init=zeros)

    def __call__(self, x, t, *, deterministic=True, rngs=None):
        training = not deterministic

        def key():
            return rngs.dropout() if training else None

        emb = self.time2(nnx.silu(self.time1(time_embedding(t, self.channels))))
        x = self.conv_in(x)
        skips = [x]
        for stage in self.down:
            for i in range(len(stage.blocks)):
                x = stage.block(i, [x], emb, key())
                skips.append(x)
            if stage.resample is not None:
                x = stage.resample(x)
                skips.append(x)
        x = self.mid1(x, emb, key())
        x = self.mid_attention(x, training)
        x = self.mid2(x, emb, key())
        for stage in self.up:
            for i in range(len(stage.blocks)):
                x = stage.block(i, [x, skips.pop()], emb, key())
            if stage.resample is not None:
                x = stage.resample(x)
        return _activated(self.norm_out, self.conv_out, x, training=training).astype(jnp.float32)


def _check(image_size, channels, multipliers, num_blocks, attention_resolutions, dropout, groups):
    """Raise ValueError where sizes do not fit together."""
    if not multipliers or not all(isinstance(m, int) and m > 0 for m in multipliers):
        raise ValueError(f'multipliers is {multipliers}, but must be positive integers, one a resolution')
    if num_blocks < 1 or groups < 1:
        raise ValueError(f'num_blocks is {num_blocks} and groups {groups}, but both must be at least 1')
    if not 0 <= dropout < 1:
        raise ValueError(f'dropout is {dropout}, but must lie in [0, 1)')
    unit = 2 ** (len(multipliers) - 1)
    if image_size < unit or image_size % unit:
        below = image_size // unit * unit
        sizes = f'{below} or {below + unit}' if below else f'{unit}'
        raise ValueError(
            f'an image size of {image_size} cannot be halved {len(multipliers) - 1} times, as '
            f'{len(multipliers)} multipliers ask; {sizes} would do, or fewer multipliers'
        )
    if channels < 4 or channels % 2:
        raise ValueError(f'channels is {channels}, but the time embedding needs an even number of at least 4')
    for m in multipliers:
        if channels * m % groups:
            raise ValueError(
                f'channels × multiplier = {channels * m} is not divisible by the {groups} groups of GroupNorm'
            )
    sizes = [image_size >> level for level in range(len(multipliers))]
    absent = [size for size in attention_resolutions if size not in sizes]
    if absent:
        raise ValueError(f'attention_resolutions {absent} are no sizes of this network, which has {sizes}')
