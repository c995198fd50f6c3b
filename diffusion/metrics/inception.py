"""Inception as FID defines it: the network of the TensorFlow archive of 2015-12-05, not the one of later libraries.

Szegedy et al. 2015, arXiv:1512.00567. It differs from today's Inception v3 in that average pools leave the padding out,
the pool of Mixed_7c takes maxima, and it has 1,008 classes. Names are those of the PyTorch files into which pytorch-fid
and torch-fidelity converted the weights.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from diffusion.metrics.layers import Images, Params, apply_conv, average_pool, check_tensors, fold, layers, max_pool

SIZE = 299  # pixels
CLASSES = 1008
NORM = ('weight', 'bias', 'running_mean', 'running_var')  # tensors of a batch norm
OUTPUTS = {'pool3': 2048, 'spatial': 17 * 17 * 7, 'logits': CLASSES}  # and their sizes


def apply(params: Params, x: Float32[Array, 'N 299 299 3']) -> dict[str, Float32[Array, 'N D']]:
    """Compute the features of images.

    Args:
        params: the result of `convert`.
        x: (N, 299, 299, 3), in the range of one of `resize.DIALECTS`.

    Returns:
        'pool3' (N, 2048), of FID; 'spatial' (N, 2023), the first seven channels of mixed_6/conv:0, of sFID; 'logits'
        (N, 1008) without bias, of the Inception score.
    """
    features = _network(functools.partial(apply_conv, params, jax.nn.relu), x)
    logits = jnp.matmul(features['pool3'], params['fc']['kernel'], precision=jax.lax.Precision.HIGHEST)
    return features | {'logits': logits}


def convert(tensors: Mapping[str, np.ndarray], where: str) -> Params:
    """Return the parameters from the tensors of a PyTorch file; batch norms are merged into the convolutions.

    Args:
        tensors: {name: tensor} of pytorch-fid's or torch-fidelity's file.
        where: the file, for errors.

    Raises:
        ValueError: the tensors are not those of this network.
    """
    check_tensors(tensors, shapes(), f'{where} does not hold the Inception network of 2015-12-05')
    params = {
        name: fold(tensors[f'{name}.conv.weight'], {key: tensors[f'{name}.bn.{key}'] for key in NORM})
        for name in layers(_network, SIZE)
    }
    return params | {'fc': {'kernel': np.ascontiguousarray(tensors['fc.weight'].T, np.float32)}}


def shapes() -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the tensors that `convert` takes."""
    found: dict[str, tuple[int, ...]] = {'fc.weight': (CLASSES, OUTPUTS['pool3']), 'fc.bias': (CLASSES,)}
    for name, shape in layers(_network, SIZE).items():
        found[f'{name}.conv.weight'] = shape
        found |= {f'{name}.bn.{key}': shape[:1] for key in NORM}
    return found


def _network(conv: Callable, x: Images) -> dict[str, Array]:
    """The convolutional part."""
    x = conv('Conv2d_1a_3x3', x, 32, 3, stride=2)
    x = conv('Conv2d_2a_3x3', x, 32, 3)
    x = conv('Conv2d_2b_3x3', x, 64, 3, padding='SAME')
    x = max_pool(x)
    x = conv('Conv2d_3b_1x1', x, 80, 1)
    x = conv('Conv2d_4a_3x3', x, 192, 3)
    x = max_pool(x)  # 35×35
    for name, pool_width in (('Mixed_5b', 32), ('Mixed_5c', 64), ('Mixed_5d', 64)):
        x = _block_a(conv, name, x, pool_width)
    x = _block_b(conv, 'Mixed_6a', x)  # 17×17
    for name, width in (('Mixed_6b', 128), ('Mixed_6c', 160)):
        x = _block_c(conv, name, x, width)[0]
    x, first_branch = _block_c(conv, 'Mixed_6d', x, 160)  # the graph's mixed_6
    x = _block_c(conv, 'Mixed_6e', x, 192)[0]
    x = _block_d(conv, 'Mixed_7a', x)  # 8×8
    x = _block_e(conv, 'Mixed_7b', x, average_pool)
    x = _block_e(conv, 'Mixed_7c', x, functools.partial(max_pool, stride=1, padding='SAME'))
    return {'pool3': x.mean(axis=(1, 2)), 'spatial': first_branch[..., :7].reshape(len(x), -1)}


def _chain(conv, block, x, *steps):
    """Convolutions one after another, each given as (name, width, size)."""
    for name, width, size in steps:
        x = conv(f'{block}.{name}', x, width, size, padding='SAME')
    return x


def _block_a(conv, block, x, pool_width):
    branches = (
        _chain(conv, block, x, ('branch1x1', 64, 1)),
        _chain(conv, block, x, ('branch5x5_1', 48, 1), ('branch5x5_2', 64, 5)),
        _chain(conv, block, x, ('branch3x3dbl_1', 64, 1), ('branch3x3dbl_2', 96, 3), ('branch3x3dbl_3', 96, 3)),
        _chain(conv, block, average_pool(x), ('branch_pool', pool_width, 1)),
    )
    return jnp.concatenate(branches, axis=-1)


def _block_b(conv, block, x):
    double = _chain(conv, block, x, ('branch3x3dbl_1', 64, 1), ('branch3x3dbl_2', 96, 3))
    branches = (
        conv(f'{block}.branch3x3', x, 384, 3, stride=2),
        conv(f'{block}.branch3x3dbl_3', double, 96, 3, stride=2),
        max_pool(x),
    )
    return jnp.concatenate(branches, axis=-1)


def _block_c(conv, block, x, width):
    """The block's output, and that of its first branch."""
    row, column = (1, 7), (7, 1)
    names = [f'branch7x7dbl_{i}' for i in range(1, 6)]
    widths, sizes = (width, width, width, width, 192), (1, column, row, column, row)
    branches = (
        _chain(conv, block, x, ('branch1x1', 192, 1)),
        _chain(conv, block, x, ('branch7x7_1', width, 1), ('branch7x7_2', width, row), ('branch7x7_3', 192, column)),
        _chain(conv, block, x, *zip(names, widths, sizes, strict=True)),
        _chain(conv, block, average_pool(x), ('branch_pool', 192, 1)),
    )
    return jnp.concatenate(branches, axis=-1), branches[0]


def _block_d(conv, block, x):
    row, column = (1, 7), (7, 1)
    three = _chain(conv, block, x, ('branch3x3_1', 192, 1))
    seven = _chain(
        conv, block, x, ('branch7x7x3_1', 192, 1), ('branch7x7x3_2', 192, row), ('branch7x7x3_3', 192, column)
    )
    branches = (
        conv(f'{block}.branch3x3_2', three, 320, 3, stride=2),
        conv(f'{block}.branch7x7x3_4', seven, 192, 3, stride=2),
        max_pool(x),
    )
    return jnp.concatenate(branches, axis=-1)


def _block_e(conv, block, x, pool):
    row, column = (1, 3), (3, 1)
    three = _chain(conv, block, x, ('branch3x3_1', 384, 1))
    double = _chain(conv, block, x, ('branch3x3dbl_1', 448, 1), ('branch3x3dbl_2', 384, 3))
    branches = (
        _chain(conv, block, x, ('branch1x1', 320, 1)),
        _chain(conv, block, three, ('branch3x3_2a', 384, row)),
        _chain(conv, block, three, ('branch3x3_2b', 384, column)),
        _chain(conv, block, double, ('branch3x3dbl_3a', 384, row)),
        _chain(conv, block, double, ('branch3x3dbl_3b', 384, column)),
        _chain(conv, block, pool(x), ('branch_pool', 192, 1)),
    )
    return jnp.concatenate(branches, axis=-1)
