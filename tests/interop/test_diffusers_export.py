"""Folders for diffusers: they are read back as what was written."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffusion.interop import diffusers, diffusers_export
from tests.interop.fixture import PIPELINE, WEIGHTS

NETWORK = dict(
    image_size=16,
    image_channels=3,
    channels=8,
    multipliers=(1, 2, 4),
    num_blocks=1,
    attention_resolutions=(8,),
    groups=4,
    dropout=0.1,
    head_channels=4,
    norm_epsilon=1e-5,
    downsample_padding=1,
    embedding_order='cos_sin',
    embedding_shift=0,
    mid_attention=True,
    variance='fixed',
)
HO = dict(head_channels=0, norm_epsilon=1e-6, downsample_padding=0, embedding_order='sin_cos', embedding_shift=1)
SCHEDULE = dict(
    name='linear',
    T=4,
    beta_start=0.1,
    beta_end=0.4,
    betas=np.linspace(0.1, 0.4, 4),
    kind='v',
    variance='large',
    clip=False,
    spacing='linspace',
)


ADM = dict(network='adm', scale_shift_norm=True, resblock_updown=False, num_heads=0)


@pytest.mark.parametrize(
    'choices',
    [
        {},
        HO,
        ADM,
        ADM | {'scale_shift_norm': False, 'resblock_updown': True, 'updown_levels': 'all'},
        ADM | {'resblock_updown': True, 'updown_levels': 'attention', 'mid_attention': False},
        {'mid_attention': False},
        {'attention_resolutions': (16,)},
        {'num_classes': 7},
        {'variance': 'learned'},
    ],
)
def test_a_network_reads_back(choices):
    network = NETWORK | choices
    settings = diffusers.network_settings(diffusers_export.network_config(**network), 'config.json')
    found = settings['model'] | {f'image_{key.removeprefix("image_")}': v for key, v in settings['data'].items()}
    assert (found.pop('first_level'), found.pop('level_scale')) == (0, 1)
    assert found == {'network': 'unet', 'num_classes': 0, 'variance': 'fixed'} | network


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'multipliers': (2, 2)}, r'multipliers is \(2, 2\), but its first entry must be 1'),
        ({'network': 'two_layers'}, "network is 'two_layers'"),
        ({'level_scale': 0.25}, 'level_scale is 0.25'),
        (ADM | {'head_channels': 0, 'num_heads': 4}, 'num_heads is 4'),
    ],
)
def test_a_network_without_an_equal_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        diffusers_export.network_config(**NETWORK | change)


@pytest.mark.parametrize(
    ('name', 'theirs'),
    [
        ('linear', 'linear'),
        ('quadratic', 'scaled_linear'),
        ('cosine', 'squaredcos_cap_v2'),
        ('sigmoid', None),  # which only DDPMScheduler has
        ('constant', None),
        ('jsd', None),
        (None, None),
    ],
)
def test_a_schedule_is_written_by_name_or_by_its_betas(name, theirs):
    written = json.loads(json.dumps(diffusers_export.scheduler_config(**SCHEDULE | {'name': name})))
    settings = diffusers.scheduler_settings(written, 'scheduler_config.json')
    if theirs:
        assert (written['beta_schedule'], written['trained_betas']) == (theirs, None)
        assert settings['schedule']['name'] == name
    else:
        np.testing.assert_array_equal(written['trained_betas'], SCHEDULE['betas'])
        assert 'name' not in settings['schedule']
    assert settings['schedule'].items() >= {'T': 4, 'beta_start': 0.1, 'beta_end': 0.4}.items()
    assert settings['model'] == {'kind': 'v'}
    assert settings['sample'].items() >= {'variance': 'auto', 'clip': False, 'spacing': 'linspace'}.items()


def test_zero_terminal_snr_reads_back():
    for zero in (False, True):
        written = diffusers_export.scheduler_config(**SCHEDULE, zero_terminal_snr=zero)
        assert diffusers.scheduler_settings(written, 'x')['schedule']['zero_terminal_snr'] == zero


def test_a_kind_that_diffusers_lacks_is_refused():
    """A config may add kinds."""
    with pytest.raises(ValueError, match="kind is 'score', but diffusers has only 'eps', 'x0', 'v'"):
        diffusers_export.scheduler_config(**SCHEDULE | {'kind': 'score'})


def test_a_spacing_that_diffusers_lacks_becomes_leading():
    config = diffusers_export.scheduler_config(**SCHEDULE | {'spacing': 'quad'})
    assert config['timestep_spacing'] == 'leading'


def test_a_pipeline_is_written_as_diffusers_lays_it_out(tmp_path):
    rng = np.random.default_rng(0)
    params = {
        'conv_in': {'kernel': rng.normal(size=(3, 3, 1, 4)), 'bias': rng.normal(size=4)},
        'down': {0: {'attentions': {1: {'query': {'kernel': rng.normal(size=(4, 6))}}}}},
    }
    network, scheduler = diffusers_export.network_config(**NETWORK), diffusers_export.scheduler_config(**SCHEDULE)
    diffusers_export.write(str(tmp_path / 'ours'), params, network=network, scheduler=scheduler)

    def files(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}

    assert files(tmp_path / 'ours') == files(PIPELINE) - {'expected.npz'}
    tensors = load_file(tmp_path / 'ours' / WEIGHTS)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        'conv_in.weight': (4, 1, 3, 3),
        'conv_in.bias': (4,),
        'down_blocks.0.attentions.1.to_q.weight': (6, 4),
    }
    assert tensors['conv_in.weight'][3, 0, 1, 2] == np.float32(params['conv_in']['kernel'][1, 2, 0, 3])
    assert diffusers.read(str(tmp_path / 'ours')).settings['model']['multipliers'] == (1, 2, 4)


@pytest.mark.parametrize('no_class', [False, True])
def test_classes_read_back(no_class, tmp_path):
    """The row of no class is exported only if it was trained, as one more class. There is no pipeline for classes."""
    network = diffusers_export.network_config(**NETWORK | {'num_classes': 2}, no_class=no_class)
    kernel = np.arange(12, dtype=np.float32).reshape(3, 4)
    scheduler = diffusers_export.scheduler_config(**SCHEDULE)
    diffusers_export.write(str(tmp_path), {'label': {'kernel': kernel}}, network=network, scheduler=scheduler)
    assert not (tmp_path / 'model_index.json').exists()
    table = load_file(tmp_path / WEIGHTS)['class_embedding.weight']
    np.testing.assert_array_equal(table, kernel if no_class else kernel[:2])
    found = diffusers.read(str(tmp_path))
    assert found.settings['model']['num_classes'] == len(table)
    layer = found.weights['params']['class_embedding.weight'].T  # our kernel
    np.testing.assert_array_equal(layer, np.concatenate([table, np.zeros((1, 4))]))


def test_a_link_in_place_of_the_weights_is_replaced(tmp_path):
    precious = tmp_path / 'precious'
    precious.write_text('mine')
    (tmp_path / WEIGHTS).parent.mkdir()
    (tmp_path / WEIGHTS).symlink_to(precious)
    network, scheduler = diffusers_export.network_config(**NETWORK), diffusers_export.scheduler_config(**SCHEDULE)
    kernel = np.ones((3, 3, 1, 4), np.float32)
    diffusers_export.write(str(tmp_path), {'conv_in': {'kernel': kernel}}, network=network, scheduler=scheduler)
    assert precious.read_text() == 'mine' and load_file(tmp_path / WEIGHTS)['conv_in.weight'].shape == (4, 1, 3, 3)
