"""The layers of feature networks: convolution with batch norm and activation, and pooling. Inference only.

A network is a function of `conv` and an image batch. `conv(name, x, width, size, …)` is called once for each
convolution, so that one description of a network yields its outputs and the shapes of its weights.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

Images = Float32[Array, 'N H W C']
Params = dict[str, dict[str, Any]]  # {layer: {'kernel': (height, width, in, out), 'bias': (out,)}}

EPSILON = 1e-3  # of every batch norm, in Inception and in EfficientNet-Lite
MOST_ERRORS = 5  # the most that one message lists


def apply_conv(
    params: Params,
    activation: Callable[[Array], Array],
    name: str,
    x: Images,
    width: int,
    size: int | tuple[int, int],
    *,
    stride: int = 1,
    padding: str = 'VALID',
    groups: int = 1,
    linear: bool = False,
) -> Images:
    """Apply a convolution with its folded batch norm, and an activation.

    Args:
        params: of the network.
        activation: applied to the result.
        name: of the layer in `params`.
        x: (N, H, W, C).
        width: output channels; the kernel in `params` determines them here.
        size: height and width of the kernel, which determines them here as well.
        stride: along both axes.
        padding: 'VALID' or 'SAME'.
        groups: groups of input channels; C is a depthwise convolution.
        linear: whether to leave out the activation.

    Returns:
        (N, H', W', width).
    """
    dimensions = ('NHWC', 'HWIO', 'NHWC')
    x = lax.conv_general_dilated(
        x,
        params[name]['kernel'],
        (stride, stride),
        padding,
        dimension_numbers=dimensions,
        feature_group_count=groups,
        precision=lax.Precision.HIGHEST,
    )
    x = x + params[name]['bias']
    return x if linear else activation(x)


def layers(network: Callable, image_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's convolution weights, in PyTorch's order (out, in/groups, height, width).

    Args:
        network: a function of `conv` and images.
        image_size: of the images that it takes, in pixels.

    Returns:
        {name: shape}.
    """
    found: dict[str, tuple[int, ...]] = {}

    def conv(name, x, width, size, *, groups=1, **rest):
        height, breadth = (int(side) for side in np.broadcast_to(size, 2))
        inputs = x.shape[-1] // groups
        found[name] = (width, inputs, height, breadth)
        kernel = jnp.zeros((height, breadth, inputs, width), jnp.float32)
        nothing = {name: {'kernel': kernel, 'bias': jnp.zeros(width, jnp.float32)}}
        return apply_conv(nothing, lambda x: x, name, x, width, size, groups=groups, **rest)

    jax.eval_shape(functools.partial(network, conv), jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32))
    return found


def fold(
    weight: Float[np.ndarray, 'out in height width'], norm: Mapping[str, Float[np.ndarray, 'out']]
) -> dict[str, np.ndarray]:
    """Merge a batch norm into the convolution before it, in float64.

    Args:
        weight: of the convolution.
        norm: the batch norm's 'weight', 'bias', 'running_mean' and 'running_var'.

    Returns:
        {'kernel': (height, width, in, out), 'bias': (out,)}, float32.
    """
    scale, shift, mean, variance = (
        np.asarray(norm[key], np.float64) for key in ('weight', 'bias', 'running_mean', 'running_var')
    )
    scale = scale / np.sqrt(variance + EPSILON)
    kernel = np.asarray(weight, np.float64).transpose(2, 3, 1, 0) * scale
    return {'kernel': kernel.astype(np.float32), 'bias': (shift - mean * scale).astype(np.float32)}


def check_tensors(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Check that tensors have the names and shapes of a network's weights, and finite values.

    Args:
        tensors: {name: tensor} in PyTorch's layout.
        expected: {name: shape}; `num_batches_tracked` of batch norms may be there as well.
        what: the file and the network that is expected there, for the error.

    Raises:
        ValueError: tensors are missing, unknown, of another shape, or not finite; the message names them.
    """
    wrong = [f'{name} {shape} is missing' for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name.endswith('num_batches_tracked'):
            continue
        if name not in expected:
            wrong.append(f'{name} {tensor.shape} is unknown')
        elif tensor.shape != expected[name]:
            wrong.append(f'{name} has shape {tensor.shape}, but {expected[name]} was expected')
        elif not np.isfinite(tensor).all():
            wrong.append(f'{name} contains {math.nan} or {math.inf}')
    if wrong:
        more = f'; and {len(wrong) - MOST_ERRORS} more' if len(wrong) > MOST_ERRORS else ''
        raise ValueError(f'{what}: {"; ".join(wrong[:MOST_ERRORS])}{more}')


def max_pool(x: Images, *, stride: int = 2, padding: str = 'VALID') -> Images:
    """Return the maxima over windows of 3 × 3 pixels, which are `stride` apart."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def average_pool(x: Images) -> Images:
    """Return the means over the 3 × 3 pixels around each pixel; at the border, over those that exist."""
    window = functools.partial(
        lax.reduce_window,
        init_value=np.float32(0),
        computation=lax.add,
        window_dimensions=(1, 3, 3, 1),
        window_strides=(1, 1, 1, 1),
        padding='SAME',
    )
    counts: Any = window(np.ones((1, *x.shape[1:3], 1), np.float32))
    return window(x) / counts
