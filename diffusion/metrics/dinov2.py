"""DINOv2's ViT-L/14, whose features FD-DINOv2 compares (Stein et al. 2023, arXiv:2306.04675).

A vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929) that was trained without labels (Oquab et al. 2023,
arXiv:2304.07193). Names are those of the PyTorch file dinov2_vitl14_pretrain.pth.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from diffusion.metrics.layers import check_tensors
from diffusion.metrics.resize import cubic

SIZE = 224  # pixels
OUTPUTS = {'class-token': 1024}  # and its size
DEPTH = 24  # blocks
PATCH = 14  # pixels
TRAINED_GRID = 37  # patches along each side of the images that the position embeddings were trained for
HEAD = 64  # channels of each attention head
EPSILON = 1e-6  # of every layer norm

Params = dict[str, Any]  # {name: tensor, 'blocks': {name: (depth, …)}}


def apply(params: Params, x: Float32[Array, 'N 224 224 3']) -> dict[str, Float32[Array, 'N D']]:
    """Compute the features of images.

    Args:
        params: the result of `convert`.
        x: (N, 224, 224, 3), in the range of a dialect of `resize.OF_DINOV2`.

    Returns:
        'class-token' (N, 1024): the first token after the last layer norm.
    """
    with jax.default_matmul_precision('highest'):
        n, height, width, channels = x.shape
        patches = x.reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, channels).swapaxes(2, 3)
        tokens = _linear(params, 'patch_embed.proj', patches.reshape(n, -1, PATCH * PATCH * channels))
        first = jnp.broadcast_to(params['cls_token'], (n, 1, tokens.shape[-1]))
        tokens = jnp.concatenate([first, tokens], axis=1) + params['pos_embed']
        tokens, _ = jax.lax.scan(lambda tokens, block: (_block(block, tokens), None), tokens, params['blocks'])
        return {'class-token': _layer_norm(params, 'norm', tokens[:, 0])}


def _block(params, x):
    """Attention and a perceptron, each after a layer norm, scaled, and added to its input."""
    h = _layer_norm(params, 'norm1', x)
    qkv = _linear(params, 'attn.qkv', h)
    heads = (*x.shape[:2], x.shape[-1] // HEAD, HEAD)
    query, key, value = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
    h = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
    x = x + params['ls1.gamma'] * _linear(params, 'attn.proj', h)
    h = jax.nn.gelu(_linear(params, 'mlp.fc1', _layer_norm(params, 'norm2', x)), approximate=False)
    return x + params['ls2.gamma'] * _linear(params, 'mlp.fc2', h)


def _linear(params, name, x):
    return x @ params[f'{name}.weight'] + params[f'{name}.bias']


def _layer_norm(params, name, x):
    centered = x - x.mean(axis=-1, keepdims=True)
    normed = centered / jnp.sqrt((centered**2).mean(axis=-1, keepdims=True) + EPSILON)
    return normed * params[f'{name}.weight'] + params[f'{name}.bias']


def shapes(width: int = OUTPUTS['class-token'], depth: int = DEPTH) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the tensors that `convert` takes."""
    found: dict[str, tuple[int, ...]] = {
        'cls_token': (1, 1, width),
        'pos_embed': (1, 1 + TRAINED_GRID**2, width),
        'mask_token': (1, width),  # used only in its training
        'patch_embed.proj.weight': (width, 3, PATCH, PATCH),
        'patch_embed.proj.bias': (width,),
        'norm.weight': (width,),
        'norm.bias': (width,),
    }
    for i in range(depth):
        for name in ('norm1.weight', 'norm1.bias', 'norm2.weight', 'norm2.bias', 'ls1.gamma', 'ls2.gamma'):
            found[f'blocks.{i}.{name}'] = (width,)
        for name, inputs, outputs in (('attn.qkv', 1, 3), ('attn.proj', 1, 1), ('mlp.fc1', 1, 4), ('mlp.fc2', 4, 1)):
            found[f'blocks.{i}.{name}.weight'] = (outputs * width, inputs * width)
            found[f'blocks.{i}.{name}.bias'] = (outputs * width,)
    return found


def convert(
    tensors: Mapping[str, np.ndarray], where: str, *, width: int = OUTPUTS['class-token'], depth: int = DEPTH
) -> Params:
    """Return the parameters from the tensors of the PyTorch file.

    Args:
        tensors: {name: tensor}.
        where: the file, for errors.
        width: of the tokens.
        depth: number of blocks.

    Raises:
        ValueError: the tensors are not those of this network.
    """
    check_tensors(tensors, shapes(width, depth), f"{where} does not hold DINOv2's ViT-L/14")

    def part(prefix):
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        # The matrices of linear layers are stored as (out, in).
        return {name: (tensor.T if tensor.ndim == 2 else tensor).astype(np.float32) for name, tensor in found.items()}

    blocks = [part(f'blocks.{i}.') for i in range(depth)]
    return {name: tensor for name, tensor in part('').items() if not name.startswith('blocks.')} | {
        'patch_embed.proj.weight': tensors['patch_embed.proj.weight'].transpose(2, 3, 1, 0).reshape(-1, width),
        'pos_embed': _resize_positions(tensors['pos_embed']),
        'blocks': {name: np.stack([block[name] for block in blocks]) for name in blocks[0]},
    }


def _resize_positions(embeddings: np.ndarray) -> np.ndarray:
    """Resize the position embeddings of patches from 37×37 to 16×16, as their code does: bicubic, a = −¾.

    Their code asks PyTorch for a ratio of (16 + 0.1)/37, so that the positions it takes lie a little closer together.
    """
    size = SIZE // PATCH
    positions = (np.arange(size) + 0.5) * TRAINED_GRID / (size + 0.1) - 0.5
    matrix = np.zeros((size, TRAINED_GRID))
    for row, position in zip(matrix, positions, strict=True):
        taps = math.floor(position) + np.arange(-1, 3)
        np.add.at(row, np.clip(taps, 0, TRAINED_GRID - 1), cubic(position - taps, -0.75))
    width = embeddings.shape[-1]
    grid = np.asarray(embeddings[0, 1:], np.float64).reshape(TRAINED_GRID, TRAINED_GRID, width)
    patches = np.einsum('hi,wj,ijc->hwc', matrix, matrix, grid, optimize=True).reshape(-1, width)
    return np.concatenate([embeddings[0, :1], patches]).astype(np.float32)
