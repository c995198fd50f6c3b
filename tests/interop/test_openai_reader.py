"""OpenAI's checkpoints, without PyTorch: what their names and shapes tell, and what has to be said.

tests/peers/test_openai.py compares outputs; tests/peers/openai_network.py has all names of a checkpoint.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from diffusion import conditions
from diffusion.configs import workdir as configs_workdir
from diffusion.interop import READERS, openai
from diffusion.interop.tensors import leaves, to_params, with_no_class
from diffusion.modes import import_weights
from diffusion.networks import ADM, make_rngs
from diffusion.util import RunError
from tests.runs import tiny

# Some names and shapes of 64x64_diffusion.pt: 192 channels × (1, 2, 3, 4), three blocks, attention at 32, 16 and 8.
GUIDED = {
    'time_embed.0.weight': (768, 192),
    'time_embed.2.bias': (768,),
    'label_emb.weight': (1000, 768),
    'input_blocks.0.0.weight': (192, 3, 3, 3),
    'input_blocks.1.0.in_layers.0.weight': (192,),
    'input_blocks.3.0.emb_layers.1.weight': (384, 768),
    'input_blocks.4.0.in_layers.2.weight': (192, 192, 3, 3),
    'input_blocks.5.0.skip_connection.weight': (384, 192, 1, 1),
    'input_blocks.5.1.qkv.weight': (1152, 384, 1),
    'input_blocks.15.1.proj_out.weight': (768, 768, 1),
    'middle_block.0.out_layers.3.weight': (768, 768, 3, 3),
    'middle_block.1.norm.bias': (768,),
    'middle_block.2.out_layers.0.weight': (768,),
    'output_blocks.0.0.in_layers.2.weight': (768, 1536, 3, 3),
    'output_blocks.3.1.qkv.bias': (2304,),
    'output_blocks.3.2.in_layers.0.weight': (768,),
    'output_blocks.11.2.out_layers.3.bias': (384,),
    'output_blocks.15.0.skip_connection.weight': (192, 384, 1, 1),
    'out.0.weight': (192,),
    'out.2.weight': (6, 192, 3, 3),
}
# And of imagenet64_uncond_100M_1500K.pt: 128 channels, attention at 16 and 8, convolutions that change the size.
IMPROVED = {
    'time_embed.0.weight': (512, 128),
    'input_blocks.0.0.weight': (128, 3, 3, 3),
    'input_blocks.4.0.op.weight': (128, 128, 3, 3),
    'input_blocks.9.1.qkv.weight': (1152, 384, 1),
    'output_blocks.7.2.conv.weight': (384, 384, 3, 3),
    'output_blocks.11.1.conv.bias': (256,),
    'out.2.weight': (6, 128, 3, 3),
}
PUBLISHED = {
    'guided': (
        GUIDED,
        dict(channels=192, attention_resolutions=(32, 16, 8), resblock_updown=True, num_classes=1000, head_channels=64),
    ),
    'improved': (IMPROVED, dict(channels=128, attention_resolutions=(16, 8), num_heads=4)),
}


@functools.cache
def abstract(**settings):
    shared = dict(dropout=0.0, groups=32, dtype=jnp.float32)
    state = nnx.state(nnx.eval_shape(lambda: ADM(**settings, **shared, rngs=make_rngs(params=jax.random.key(0)))))
    return nnx.to_pure_dict(state)


@functools.cache
def their_shapes(**settings):
    """{name: shape} of a checkpoint of this network, by our names: NAME[query] and so on are joined again."""
    levels = [settings['image_size'] >> level for level in range(len(settings['multipliers']))]
    attends = [size in settings['attention_resolutions'] for size in levels]
    shapes = {}
    for path, leaf in leaves(abstract(**settings)):
        (name,) = openai.names(path, settings['num_blocks'], attends)
        shape = tuple(leaf.shape[axis] for axis in {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim])
        base, _, part = name.partition('[')
        if part:
            shape = (3 * shape[0], *shape[1:])
        if base == 'label_emb.weight':
            shape = (shape[1] - 1, shape[0])
        one_pixel = base.endswith(('qkv.weight', 'proj_out.weight'))
        shapes[base] = shape + (1,) * one_pixel
    return shapes


def network(name):
    _, settings = PUBLISHED[name]
    return dict(image_size=64, image_channels=3, multipliers=(1, 2, 3, 4), num_blocks=3, out_channels=6) | settings


@pytest.mark.slow
@pytest.mark.parametrize('name', PUBLISHED)
def test_names_and_shapes_of_the_published_checkpoints(name):
    """Ours are all of theirs, and tell the network again."""
    some, _ = PUBLISHED[name]
    shapes = their_shapes(**network(name))
    assert {key: shapes.get(key) for key in some} == some
    counts = {'guided': 295_904_454, 'improved': 121_063_942}
    assert sum(map(math.prod, shapes.values())) == counts[name]
    empty = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    settings = openai.network_settings(empty, 'model.pt', 64)
    assert settings['data'] == {'image_size': 64, 'channels': 3}
    expected = {k: v for k, v in network(name).items() if k in settings['model']}
    assert {k: settings['model'][k] for k in expected} == expected
    assert settings['model']['scale_shift_norm'] and settings['model']['variance'] == 'learned'
    assert settings['model']['resblock_updown'] == (name == 'guided')


TINY = dict(image_size=8, image_channels=1, channels=32, multipliers=(1, 1), num_blocks=1, attention_resolutions=(4,))


def tensors(seed=0, **settings):
    draw = np.random.default_rng(seed)
    shapes = their_shapes(**TINY | settings)
    return {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize('order', ['legacy', 'new'])
def test_every_tensor_has_its_place(order):
    """Queries, keys and values are found by an index of their own; nothing is left over, and nothing is missing."""
    settings = dict(num_classes=3, resblock_updown=True)
    given = tensors(**settings)
    parts = openai.split(given, 'model.pt', num_heads=4, head_channels=0, order=order)
    parts['label_emb.weight'] = with_no_class(parts['label_emb.weight'])
    params = to_params(parts, abstract(**TINY | settings), lambda p: openai.names(p, 1, [False, True]), 'model.pt')
    qkv = given['middle_block.1.qkv.weight']
    kernels = params['mid_attention']
    for head, kind, channel in [(0, 0, 0), (1, 2, 7), (3, 1, 5)]:
        row = 24 * head + 8 * kind + channel if order == 'legacy' else 32 * kind + 8 * head + channel
        kernel = kernels[('query', 'key', 'value')[kind]]['kernel']
        np.testing.assert_array_equal(kernel[:, 8 * head + channel], qkv[row, :, 0])
    np.testing.assert_array_equal(params['label']['kernel'][:3], given['label_emb.weight'])
    assert not params['label']['kernel'][3].any()


# What the files do not say


def read(folder, given, name='model.safetensors', **asked):
    save_file(given, folder / name)
    return READERS['openai'](str(folder / name), **dict(image_size=8, num_heads=4, attention_order='new') | asked)


def without(prefix):
    return {name: tensor for name, tensor in tensors().items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ('change', 'asked', 'words'),
    [
        ({}, dict(num_heads=0), ('config.model.num_heads', 'config.model.head_channels')),
        ({}, dict(attention_order=''), ('config.interop.attention_order', "'new'", "'legacy'")),
        ({}, dict(num_heads=5), ('has 96 rows', 'config.model.num_heads=5')),
        ({}, dict(head_channels=64), ('config.model.head_channels=64',)),
        ({}, dict(image_size=0), ('config.data.image_size',)),
        ({'input_blocks.0.0.weight': (32, 6, 3, 3)}, {}, ('6 channels', 'enlarge images')),
        ({'input_blocks.0.0.weight': (16, 1, 3, 3)}, {}, ('16 wide', '[32, 32]')),
        ({'out.2.weight': (3, 32, 3, 3)}, {}, ('1 channels', 'returns 3')),
        ({'time_embed.0.weight': (256, 64)}, {}, ('[32, 32]', '64 channels of the time embedding')),
        ({'time_embed.0.weight': (256,)}, {}, ('time_embed.0.weight has shape (256,)',)),
        ({'middle_block.1.qkv.weight': ()}, {}, ('middle_block.1.qkv.weight has shape (), but queries, keys',)),
        ({'middle_block.1.qkv.weight': (0, 32, 1)}, {}, ('middle_block.1.qkv.weight has shape (0, 32, 1)',)),
        ({'middle_block.1.qkv.bias': (96, 2)}, {}, ('middle_block.1.qkv.bias has shape (96, 2)',)),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(change, asked, words, tmp_path):
    given = tensors() | {name: np.ones(shape, np.float32) for name, shape in change.items()}
    with pytest.raises(ValueError, match=r'model\.safetensors') as error:
        read(tmp_path, given, **asked)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_other_networks_are_refused(tmp_path):
    for given, words in (
        (without('output_blocks'), 'is a classifier'),
        ({'weight': np.ones(3, np.float32)}, 'input_blocks.0.0.weight is missing'),
    ):
        with pytest.raises(ValueError, match=words):
            read(tmp_path, given)
    with pytest.raises(ValueError, match=r'nothing\.safetensors is missing'):
        READERS['openai'](str(tmp_path / 'nothing.safetensors'), image_size=8)


def test_a_published_file_is_recognized_by_its_name(tmp_path):
    found = read(tmp_path, tensors(), 'lsun_uncond_100M_1200K_bs128.safetensors', num_heads=4)
    assert 'schedule' not in found.settings and not found.facts
    (tmp_path / '64x64_diffusion.pt').write_bytes(b'no tensors')
    with pytest.raises(ValueError, match=r'64x64_diffusion\.pt cannot be read as tensors of PyTorch'):
        READERS['openai'](str(tmp_path / '64x64_diffusion.pt'), image_size=8)
    size, model, schedule, order = openai.PUBLISHED['64x64_diffusion.pt']
    assert (size, model['head_channels'], schedule['name'], schedule['T'], order) == (64, 64, 'cosine', 1000, 'new')
    _, model, schedule, _ = openai.PUBLISHED['cifar10_uncond_50M_500K.pt']
    assert (model['num_heads'], schedule['T'], model['level_scale'] * schedule['T']) == (4, 4000, 1000)


# The mode


def import_to(path, given, **asked):
    save_file(given, path / 'model.safetensors')
    changes = {'interop.source': f'openai:{path / "model.safetensors"}', 'model.num_heads': 4}
    changes |= {'interop.attention_order': 'legacy'} | {key.replace('__', '.'): value for key, value in asked.items()}
    return import_weights.run(tiny(changes), str(path / 'run'))


@pytest.mark.slow
def test_a_conditional_workdir_has_no_unconditional_model(tmp_path):
    """No training used the row of no class, which their networks do not have. It may have a learned variance."""
    assert import_to(tmp_path, tensors(num_classes=10, resblock_updown=True, out_channels=2)) == 0
    path = str(tmp_path / 'run')
    config = configs_workdir.get_config(path)
    assert (config.model.num_classes, config.data.labels, config.model.num_heads) == (10, True, 4)
    assert (config.model.network, config.model.variance) == ('adm', 'learned')
    conditions.require_conditions(config, path)
    for changes in ({'guidance': 2.0, 'labels': 'all'}, {'guidance': 1.0, 'labels': 'none'}):
        config.sample.update(changes)
        with pytest.raises(RunError, match=r'train\.label_dropout=0, so that it has no unconditional model'):
            conditions.require_conditions(config, path)


def test_what_the_config_says_must_agree(tmp_path):
    with pytest.raises(RunError, match=r'data\.labels is True, but the network of .* is unconditional'):
        import_to(tmp_path, tensors(), data__labels=True)
    assert not (tmp_path / 'run').exists()
