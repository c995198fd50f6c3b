"""Folders of diffusers, read without diffusers: what our network cannot express is refused by key and value."""

import json
import os
import shutil
import struct
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion.interop import READERS, diffusers
from tests.interop import fixture


def read(place):
    return READERS['diffusers'](str(place), image_size=0)


# Networks and schedulers


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('num_class_embeds', 0),
        ('class_embed_type', 'timestep'),
        ('resnet_time_scale_shift', 'ada_group'),
        ('time_embedding_type', 'fourier'),
        ('time_embedding_dim', 64),
        ('flip_sin_to_cos', 'yes'),
        ('freq_shift', 2),
        ('block_out_channels', [4, 6]),
        ('norm_eps', 0),
        ('act_fn', 'gelu'),
        ('downsample_padding', 2),
        ('attention_head_dim', 0),
        ('attention_head_dim', [8, 8]),
        ('attn_norm_num_groups', 1),
        ('mid_block_type', None),
        ('mid_block_scale_factor', 2),
        ('add_attention', None),
        ('downsample_type', 'fir'),
        ('center_input_sample', True),
        ('down_block_types', ['DownBlock2D', 'SkipDownBlock2D']),
        ('down_block_types', [['DownBlock2D'], {}]),
        ('up_block_types', ['AttnUpBlock2D', 'AttnUpBlock2D']),
        ('out_channels', 3),
        ('sample_size', [8, 16]),
        ('sample_size', None),
        ('sample_size', '8'),
        ('block_out_channels', []),
        ('block_out_channels', [4, '8']),
        ('layers_per_block', [1, 1]),
        ('norm_num_groups', None),
        ('something_new', 1),
        ('_class_name', 'UNet2DConditionModel'),
    ],
)
def test_other_networks_are_refused(key, value, tmp_path):
    folder = fixture.changed(tmp_path, fixture.NETWORK, **{key: value})
    with pytest.raises(ValueError, match=r'theirs/unet/config\.json: ') as error:
        read(folder)
    assert key in str(error.value) and repr(value) in str(error.value)


def test_no_message_about_a_network_invites_to_edit_the_file(tmp_path):
    """Another time embedding, for example, changes the output of google/ddpm-cifar10-32's network by half."""
    for key, value in (('time_embedding_type', 'fourier'), ('act_fn', 'gelu'), ('something_new', 1)):
        folder = fixture.changed(tmp_path / key, fixture.NETWORK, **{key: value})
        with pytest.raises(ValueError, match='cannot be imported; editing the file would not change what they have'):
            read(folder)
    folder = fixture.changed(tmp_path, fixture.SCHEDULER, thresholding=True)  # of sampling, not of the weights
    with pytest.raises(ValueError, match=r'thresholding is True.*weights do not depend on it') as error:
        read(folder)
    assert 'editing' not in str(error.value)


def test_an_image_size_that_the_file_does_not_say_is_the_config_s(tmp_path):
    folder = fixture.changed(tmp_path, fixture.NETWORK, sample_size=None)
    assert diffusers.read(str(folder), image_size=16).settings['data']['image_size'] == 16


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('rescale_betas_zero_snr', 'yes'),
        ('beta_schedule', 'laplace'),
        ('variance_type', 'learned'),
        ('variance_type', 'learned_range'),  # but the network has no outputs for it
        ('variance_type', ['fixed_small']),
        ('prediction_type', 'flow_prediction'),
        ('prediction_type', ['epsilon']),
        ('num_train_timesteps', 0),
        ('clip_sample', 'yes'),
        ('thresholding', True),
        ('clip_sample_range', 2.0),
        ('steps_offset', 1),
        ('timestep_spacing', 'even'),
        ('snr_shift_scale', 3.0),
        ('_class_name', 'ScoreSdeVeScheduler'),
        ('_class_name', ['DDPMScheduler']),
        ('predict_epsilon', 'no'),
    ],
)
def test_other_schedulers_are_refused(key, value, tmp_path):
    folder = fixture.changed(tmp_path, fixture.SCHEDULER, **{key: value})
    with pytest.raises(ValueError, match=r'theirs/scheduler/scheduler_config\.json: ') as error:
        read(folder)
    assert key in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize(
    ('betas', 'words'),
    [
        ([0.1, 0.2], ['2 numbers', 'num_train_timesteps is 100']),
        ([0.1] * 99 + [1.5], ['(0, 1]']),
        ([0.1] * 99 + ['0.1'], ['numbers in (0, 1]']),
        ('linear', ['numbers in (0, 1]']),
    ],
)
def test_malformed_betas_are_refused(betas, words, tmp_path):
    folder = fixture.changed(tmp_path, fixture.SCHEDULER, trained_betas=betas)
    with pytest.raises(ValueError, match=r'theirs/scheduler/scheduler_config\.json: trained_betas') as error:
        read(folder)
    assert all(word in str(error.value) for word in words)


def test_a_long_value_is_shortened(tmp_path):
    folder = fixture.changed(tmp_path, fixture.NETWORK, block_out_channels=['8'] * 1000)
    with pytest.raises(ValueError, match=r'block_out_channels is .* …, but') as error:
        read(folder)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    'changes',
    [
        {'sample_size': [8, 8]},
        {'attention_head_dim': 8},  # one head of 8 channels, the width of all that attends
        {'act_fn': 'swish', 'attn_norm_num_groups': 2, 'time_embedding_dim': 16},
    ],
)
def test_other_spellings_of_the_same_network(changes, tmp_path):
    folder = fixture.changed(tmp_path, fixture.NETWORK, **changes)
    assert read(folder).settings == read(fixture.PIPELINE).settings


def test_a_network_without_a_size_takes_that_of_the_config(tmp_path):
    folder = fixture.changed(tmp_path, fixture.NETWORK, sample_size=None)
    found = READERS['diffusers'](str(folder), image_size=12).settings
    assert found['data']['image_size'] == 12 and found['model']['attention_resolutions'] == (6,)


def test_keys_that_a_scheduler_does_not_use_are_ignored(tmp_path):
    changes = {'clip_sample': False, 'clip_sample_range': 3.0, 'timestep_spacing': 'trailing', 'steps_offset': 1}
    sample = read(fixture.changed(tmp_path, fixture.SCHEDULER, **changes)).settings['sample']
    assert (sample['clip'], sample['spacing']) == (False, 'trailing')


@pytest.mark.parametrize(('old', 'kind'), [(True, 'eps'), (False, 'x0'), (None, 'eps')])
def test_the_key_of_older_files_for_what_is_predicted(old, kind):
    """As diffusers 0.10 converts it; null is no value."""
    values = {'_class_name': 'DDPMScheduler', 'predict_epsilon': old}
    assert diffusers.scheduler_settings(values, 'scheduler_config.json')['model'] == {'kind': kind}


def test_the_config_of_the_google_ddpms():
    """The config.json of google/ddpm-cifar10-32."""
    config = {
        '_class_name': 'UNet2DModel', '_diffusers_version': '0.1.1', 'act_fn': 'silu', 'attention_head_dim': None,
        'block_out_channels': [128, 256, 256, 256], 'center_input_sample': False,
        'down_block_types': ['DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'],
        'downsample_padding': 0, 'flip_sin_to_cos': False, 'freq_shift': 1, 'in_channels': 3, 'layers_per_block': 2,
        'mid_block_scale_factor': 1, 'norm_eps': 1e-06, 'norm_num_groups': 32, 'out_channels': 3, 'sample_size': 32,
        'time_embedding_type': 'positional',
        'up_block_types': ['UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'],
    }  # fmt: skip
    assert diffusers.network_settings(config, 'config.json') == {
        'data': {'image_size': 32, 'channels': 3},
        'model': {
            'network': 'unet', 'num_classes': 0, 'level_scale': 1.0,
            'channels': 128, 'multipliers': (1, 2, 2, 2), 'num_blocks': 2, 'attention_resolutions': (16,),
            'groups': 32, 'dropout': 0.0, 'first_level': 0, 'head_channels': 0, 'norm_epsilon': 1e-6,
            'variance': 'fixed', 'mid_attention': True,
            'downsample_padding': 0, 'embedding_order': 'sin_cos', 'embedding_shift': 1,
        },
    }  # fmt: skip


def test_what_a_file_does_not_say_is_diffusers_default():
    """As the signatures of UNet2DModel, DDPMScheduler and DDIMScheduler have it; files of old versions lack keys."""
    network = diffusers.network_settings({'_class_name': 'UNet2DModel', 'sample_size': 32}, 'config.json')
    assert network == {
        'data': {'image_size': 32, 'channels': 3},
        'model': {
            'network': 'unet', 'num_classes': 0, 'level_scale': 1.0,
            'channels': 224, 'multipliers': (1, 2, 3, 4), 'num_blocks': 2, 'attention_resolutions': (16, 8, 4),
            'groups': 32, 'dropout': 0.0, 'first_level': 0, 'head_channels': 8, 'norm_epsilon': 1e-5,
            'variance': 'fixed', 'mid_attention': True,
            'downsample_padding': 1, 'embedding_order': 'cos_sin', 'embedding_shift': 0,
        },
    }  # fmt: skip
    schedule = {'T': 1000, 'name': 'linear', 'beta_start': 1e-4, 'beta_end': 0.02, 'zero_terminal_snr': False}
    schedule |= {'offset': 0.008, 'max_beta': 0.999}
    for name, steps, eta in (('DDPMScheduler', 1000, 1), ('DDIMScheduler', 50, 0)):
        assert diffusers.scheduler_settings({'_class_name': name}, 'scheduler_config.json') == {
            'model': {'kind': 'eps'},
            'schedule': schedule,
            'sample': {'num_steps': steps, 'eta': eta, 'variance': 'small', 'clip': True, 'spacing': 'leading'},
        }


def test_twice_as_many_outputs_are_a_learned_variance(tmp_path):
    folder = fixture.changed(tmp_path, fixture.NETWORK, out_channels=2)
    with pytest.raises(ValueError, match=r"variance_type is 'fixed_large', but the network .* 'learned_range'"):
        read(folder)
    path = folder / fixture.SCHEDULER
    path.write_text(json.dumps(json.loads(path.read_text()) | {'variance_type': 'learned_range'}))
    settings = read(folder).settings
    assert (settings['model']['variance'], settings['sample']['variance']) == ('learned', 'auto')


def test_scale_and_shift_are_openai_s(tmp_path):
    """But not if attention in the middle has no norm, as it has none without a number of groups of its own."""
    folder = fixture.changed(tmp_path / 'with', fixture.NETWORK, resnet_time_scale_shift='scale_shift')
    with pytest.raises(ValueError, match='attn_norm_num_groups is None, but must be norm_num_groups, 2'):
        read(folder)
    changes = dict(resnet_time_scale_shift='scale_shift', attn_norm_num_groups=2)
    model = read(fixture.changed(tmp_path / 'without', fixture.NETWORK, **changes)).settings['model']
    assert model['network'] == 'adm' and model['scale_shift_norm'] and not model['resblock_updown']


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({'downsample_type': 'resnet'}, None),  # the encoder's level with attention is its last
        ({'upsample_type': 'resnet'}, 'attention'),
        ({'upsample_type': 'resnet', 'down_block_types': ['ResnetDownsampleBlock2D', 'AttnDownBlock2D']}, 'all'),
    ],
)
def test_the_levels_at_which_residual_blocks_change_the_size(changes, expected, tmp_path):
    model = read(fixture.changed(tmp_path, fixture.NETWORK, **changes)).settings['model']
    assert model.get('updown_levels') == expected
    assert model['network'] == ('adm' if expected else 'unet') and model.get('resblock_updown', False) == bool(expected)
    assert not model.get('scale_shift_norm')


def test_sizes_changed_in_two_ways_are_refused(tmp_path):
    changes = {'down_block_types': ['ResnetDownsampleBlock2D', 'AttnDownBlock2D']}
    folder = fixture.changed(tmp_path, fixture.NETWORK, **changes)
    with pytest.raises(ValueError, match=r"upsample_type is 'conv', but .* by convolutions everywhere, by residual"):
        read(folder)


def test_a_network_without_a_scheduler_leaves_schedule_and_sampling_open():
    found = read(fixture.PIPELINE / 'unet')
    assert set(found.settings) == {'data', 'model'} and 'kind' not in found.settings['model']
    assert set(read(fixture.PIPELINE).settings) == {'data', 'model', 'schedule', 'sample'}


# Files of weights


def test_the_average_of_a_training_script_s_checkpoint(tmp_path):
    """unet_ema has the same tensors with other values, and keys that say how they were averaged."""
    folder = fixture.copy(tmp_path)
    (folder / 'scheduler' / 'scheduler_config.json').unlink()
    shutil.copytree(folder / 'unet', folder / 'unet_ema')
    config = json.loads((folder / fixture.NETWORK).read_text())
    average = {'decay': 0.9999, 'inv_gamma': 1.0, 'min_decay': 0.0, 'optimization_step': 500, 'power': 0.75}
    average |= {'update_after_step': 0, 'use_ema_warmup': True}
    (folder / 'unet_ema' / 'config.json').write_text(json.dumps(config | average))
    path = folder / 'unet_ema' / 'diffusion_pytorch_model.safetensors'
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    found, alone = read(folder), read(folder / 'unet_ema')
    assert found.weights.keys() == {'params', 'ema'} and found.settings == alone.settings
    for name, tensor in found.weights['params'].items():
        np.testing.assert_array_equal(found.weights['ema'][name], 2 * tensor)
        np.testing.assert_array_equal(alone.weights['params'][name], 2 * tensor)

    (folder / 'unet_ema' / 'config.json').write_text(json.dumps(config | average | {'norm_eps': 0.01}))
    with pytest.raises(ValueError, match=r'unet_ema/config\.json describes another network than .*unet/config\.json'):
        read(folder)


def test_a_truncated_file(tmp_path):
    """The first incomplete tensor is named; a header that is cut or senseless is an error, too."""
    folder = fixture.copy(tmp_path)
    path = folder / fixture.WEIGHTS
    whole = path.read_bytes()
    (length,) = struct.unpack('<Q', whole[:8])
    header = json.loads(whole[8 : 8 + length])
    start, end = header['mid_block.resnets.0.conv1.weight']['data_offsets']
    for content, words in (
        (whole[: 8 + length + (start + end) // 2], 'it ends within mid_block.resnets.0.conv1.weight '),
        (whole[:100], 'cannot be read'),
        (whole[:8] + b'x' * (len(whole) - 8), 'cannot be read'),
        (b'', 'cannot be read'),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words) as error:
            read(folder)
        assert str(path) in str(error.value)


def test_a_type_that_numpy_does_not_have(tmp_path):
    folder = fixture.copy(tmp_path)
    header = json.dumps({'conv_out.bias': {'dtype': 'F8_E4M3', 'shape': [4], 'data_offsets': [0, 4]}}).encode()
    (folder / fixture.WEIGHTS).write_bytes(struct.pack('<Q', len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match=r'holds conv_out\.bias as F8_E4M3, but floating point') as error:
        read(folder)
    assert str(folder / fixture.WEIGHTS) in str(error.value)


def split(folder):
    """Split the weights of a folder into two files; return the index."""
    arrays = load_file(folder / fixture.WEIGHTS)
    (folder / fixture.WEIGHTS).unlink()
    names = sorted(arrays)
    places = {}
    for i, part in enumerate((names[:20], names[20:])):
        file = f'diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors'
        save_file({name: arrays[name] for name in part}, folder / 'unet' / file)
        places |= dict.fromkeys(part, file)
    return {'metadata': {}, 'weight_map': places}


def test_weights_in_parts(tmp_path):
    folder = fixture.copy(tmp_path)
    index = split(folder)
    name, file = next(iter(index['weight_map'].items()))
    path = folder / f'{fixture.WEIGHTS}.index.json'
    path.write_text(json.dumps(index))
    found = read(folder).weights['params']
    whole = load_file(fixture.PIPELINE / fixture.WEIGHTS)
    assert found.keys() == whole.keys() and all((found[name] == whole[name]).all() for name in whole)

    shutil.copy(folder / 'unet' / file, folder / file)
    for change, words in (
        ({name: f'../{file}'}, 'points outside its folder'),
        ({name: str(folder / file)}, 'points outside its folder'),
        ({name: 'diffusion_pytorch_model-00002-of-00002.safetensors'}, f'differ.*{name}'),
        ({'another.weight': file}, 'differ.*another.weight'),
        ({name: 3}, 'no weight_map'),
    ):
        path.write_text(json.dumps({'weight_map': index['weight_map'] | change}))
        with pytest.raises(ValueError, match=words):
            read(folder)
    path.write_text('[')
    with pytest.raises(ValueError, match=r'index\.json cannot be read'):
        read(folder)
    path.write_text(json.dumps(index))
    (folder / 'unet' / file).unlink()
    with pytest.raises(ValueError, match=f'{file} is missing'):
        read(folder)


def test_folders_that_lack_a_file(tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match=r'empty/config\.json cannot be read'):
        read(tmp_path / 'empty')
    folder = fixture.copy(tmp_path)
    (folder / fixture.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r'unet has no diffusion_pytorch_model\.safetensors, but no weights'):
        read(folder)


@pytest.mark.parametrize('file', ['model.fp16.safetensors', 'model-00001-of-00002.bin', 'model.bin.index.json'])
def test_weights_under_another_name_are_named(file, tmp_path):
    folder = fixture.copy(tmp_path)
    (folder / fixture.WEIGHTS).rename(folder / 'unet' / f'diffusion_pytorch_{file}')
    with pytest.raises(ValueError, match=rf'has no {fixture.WEIGHTS[5:]}, but diffusion_pytorch_{file}: save'):
        read(folder)


@pytest.mark.parametrize('file', [fixture.NETWORK, fixture.SCHEDULER, fixture.WEIGHTS])
def test_files_that_would_block_or_overflow_the_stack(file, tmp_path):
    """A pipe, and JSON of a hundred thousand brackets."""
    folder = fixture.copy(tmp_path)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(ValueError, match=f'{folder / file}.* regular file'):
        read(folder)
    (folder / file).unlink()
    nested = b'[' * 100_000
    (folder / file).write_bytes(struct.pack('<Q', len(nested)) + nested if file == fixture.WEIGHTS else nested)
    with pytest.raises(ValueError, match=f'{folder / file} cannot be read'):
        read(folder)


def test_a_pipe_in_place_of_a_pytorch_file(tmp_path):
    os.mkfifo(tmp_path / 'model.ckpt')
    with pytest.raises(ValueError, match=r'model\.ckpt is not a regular file'):
        READERS['ddim'](str(tmp_path / 'model.ckpt'), image_size=8)


# Libraries that are not installed, and the hub


def test_pytorch_is_asked_for_only_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    folder = fixture.copy(tmp_path)
    read(folder)
    (folder / fixture.WEIGHTS).rename(folder / 'unet' / 'diffusion_pytorch_model.bin')
    with pytest.raises(ValueError, match='not installed: pip install torch'):
        read(folder)
    with pytest.raises(ValueError, match='not installed: pip install torch'):
        READERS['ddim'](str(tmp_path / 'model.ckpt'), image_size=8)


@pytest.mark.parametrize('version', ['1.13.1', '2.5.1+cu124'])
def test_versions_of_pytorch_in_which_a_file_may_run_code(version, tmp_path, monkeypatch):
    """CVE-2025-32434."""
    torch = types.SimpleNamespace(__version__=version, load=lambda *_, **__: pytest.fail('it was read'))
    monkeypatch.setitem(sys.modules, 'torch', torch)
    (tmp_path / 'model.ckpt').write_bytes(b'')
    with pytest.raises(ValueError, match=r"model\.ckpt could run code .* pip install 'torch>=2\.6'"):
        READERS['ddim'](str(tmp_path / 'model.ckpt'), image_size=8)


def test_the_hub(tmp_path, monkeypatch):
    """Without its library, and if it cannot be reached. A download is a folder, and is read like any other."""
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ValueError, match=r'no folder google/ddpm; .* pip install huggingface_hub'):
        read('google/ddpm')

    asked = []

    class Hub:
        def snapshot_download(self, repo, allow_patterns):
            asked.append((repo, allow_patterns))
            if repo == 'google/ddpm':
                raise ConnectionError('no\n\nnetwork')
            return str(fixture.PIPELINE)

    monkeypatch.setitem(sys.modules, 'huggingface_hub', Hub())
    with pytest.raises(ValueError, match=r'no folder google/ddpm, and .* \(ConnectionError: no network\)'):
        read('google/ddpm')
    assert read('someone/digits').settings == read(fixture.PIPELINE).settings
    assert [repo for repo, _ in asked] == ['google/ddpm', 'someone/digits']
    assert not any('bin' in pattern for _, patterns in asked for pattern in patterns)


def test_the_same_weights_whatever_the_folder_looks_like(tmp_path):
    """Older pipelines have no subfolders."""
    flat = tmp_path / 'flat'
    flat.mkdir()
    for file in (fixture.NETWORK, fixture.SCHEDULER, fixture.WEIGHTS):
        shutil.copy(fixture.PIPELINE / file, flat)
    found, expected = read(flat), read(fixture.PIPELINE)
    assert found.settings == expected.settings
    assert all(np.array_equal(found.weights['params'][name], t) for name, t in expected.weights['params'].items())
