"""Checkpoints of the DDIM code, without PyTorch; tests/peers/test_interop.py reads real files."""

import numpy as np
import pytest

from diffusion.interop import ddim


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('conv_in.weight', (0, 3, 3, 3)),
        ('conv_in.weight', (4, 0, 3, 3)),
        ('conv_in.weight', (4, 3)),
        ('down.0.block.0.conv1.weight', (0, 4, 3, 3)),
        ('down.1.block.0.conv1.weight', ()),
        ('down.1.block.0.conv1.weight', (0, 4, 3, 3)),
    ],
)
def test_tensors_that_are_not_convolutions_are_refused(name, shape):
    shapes = {'conv_in.weight': (4, 3, 3, 3), 'down.0.block.0.conv1.weight': (4, 4, 3, 3), name: shape}
    with pytest.raises(ValueError, match=r'model\.ckpt is not a network of the DDIM code') as error:
        ddim.network_settings({name: np.ones(shape) for name, shape in shapes.items()}, 'model.ckpt', 8)
    assert f'{name} has shape {shape}' in str(error.value)


def test_the_shapes_of_the_tensors_tell_the_network():
    """The DDIM code's CIFAR-10 network: ch 128, ch_mult [1, 2, 2, 2], two blocks a level, attention at 16."""
    tensors = {'conv_in.weight': np.ones((128, 3, 3, 3)), 'down.1.attn.0.q.weight': np.ones((256, 256, 1, 1))}
    for level, width in enumerate((128, 256, 256, 256)):
        for block in range(2):
            tensors[f'down.{level}.block.{block}.conv1.weight'] = np.ones((width, 1, 3, 3))
    assert ddim.network_settings(tensors, 'model.ckpt', 32) == {
        'data': {'image_size': 32, 'channels': 3},
        'model': {
            'network': 'unet', 'variance': 'fixed', 'kind': 'eps',
            'channels': 128, 'multipliers': (1, 2, 2, 2), 'num_blocks': 2,
            'attention_resolutions': (16,), 'groups': 32, 'first_level': 0, 'level_scale': 1.0, 'head_channels': 0,
            'norm_epsilon': 1e-6,
            'downsample_padding': 0, 'mid_attention': True, 'embedding_order': 'sin_cos', 'embedding_shift': 1,
        },
    }  # fmt: skip
    with pytest.raises(ValueError, match=r'set config\.data\.image_size'):
        ddim.network_settings(tensors, 'model.ckpt', 0)


def test_names_of_parameters():
    """As in the DDIM code's models/diffusion.py, where up.0 is the finest level."""
    assert ddim.names(('up', 0, 'resample', 'kernel'), 3) == ('up.2.upsample.conv.weight',)
    assert ddim.names(('down', 1, 'attentions', 0, 'query', 'bias'), 3) == ('down.1.attn.0.q.bias',)
    assert ddim.names(('mid1', 'norm1', 'scale'), 3) == ('mid.block_1.norm1.weight',)
