"""Tensors of the tiny pipeline as our parameters, and back: a wrong tensor is named, and nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from diffusion.interop import diffusers
from diffusion.interop.tensors import to_params, to_tensors
from diffusion.networks import NETWORKS, make_rngs
from tests.interop.fixture import PIPELINE, WEIGHTS

NAME = 'down_blocks.1.resnets.0.conv1.weight'


@pytest.fixture(scope='module')
def expected():
    """The shapes of our parameters for the tiny pipeline's network."""
    settings = diffusers.read(str(PIPELINE)).settings
    others = ('network', 'variance', 'kind', 'first_level', 'level_scale')
    model = {k: v for k, v in settings['model'].items() if k not in others}
    size = {'image_size': settings['data']['image_size'], 'image_channels': settings['data']['channels']}

    def make():
        return nnx.state(NETWORKS['unet'](**model, **size, dtype=jnp.float32, rngs=make_rngs(default=0)))

    return nnx.to_pure_dict(nnx.eval_shape(make))


@pytest.fixture
def tensors():
    return load_file(PIPELINE / WEIGHTS)


def test_there_and_back(tensors, expected):
    params = to_params(tensors, expected, diffusers.names, 'the file')
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    back = to_tensors(params, diffusers.names)
    assert back.keys() == tensors.keys() and all(np.array_equal(back[name], tensors[name]) for name in tensors)


def drop(tensors, name):
    del tensors[name]


def rename(tensors, name):
    tensors['another.' + name] = tensors.pop(name)


def replace(value):
    def change(tensors, name):
        tensors[name] = value(tensors[name])

    return change


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (drop, ['is missing', '(8, 4, 3, 3)']),
        (rename, ['is missing', 'another.', 'is unknown']),
        (lambda tensors, name: tensors.update({'ema.' + name: tensors[name]}), ['ema.', 'is unknown']),
        (replace(lambda tensor: tensor[:, :, 1:]), ['(8, 4, 2, 3)', '(8, 4, 3, 3) was expected']),
        (replace(lambda tensor: np.ascontiguousarray(tensor.swapaxes(0, 1))), ['(4, 8, 3, 3)', '(8, 4, 3, 3)']),
        (replace(lambda tensor: tensor.astype(np.int32)), ['int32']),
        (replace(lambda tensor: np.where(tensor == tensor[0, 0, 0, 0], np.nan, tensor)), ['nan']),
    ],
    ids=['missing', 'renamed', 'extra', 'cut', 'transposed', 'integers', 'nan'],
)
def test_a_wrong_tensor_is_named(change, words, tensors, expected):
    change(tensors, NAME)
    with pytest.raises(ValueError, match='the file does not hold this network') as error:
        to_params(tensors, expected, diffusers.names, 'the file')
    for word in (NAME, *words):
        assert word in str(error.value)


def test_many_wrong_tensors_are_counted(tensors, expected):
    with pytest.raises(ValueError, match=rf'; and {len(tensors) - 8} more$'):
        to_params({}, expected, diffusers.names, 'the file')


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16])
def test_half_precision_becomes_float32(dtype, tensors, expected):
    half = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    params = to_params(half, expected, diffusers.names, 'the file')
    kernel = half['conv_out.weight'].astype(np.float32).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params['conv_out']['kernel'], kernel)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
