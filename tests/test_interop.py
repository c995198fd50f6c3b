"""Weights from elsewhere, without the libraries that wrote them: tests/fixtures/pipeline is a pipeline of diffusers.

What it should say is in expected.npz, by diffusers; tests/peers/test_interop.py made both, and tests far more.
"""

import json
import pathlib
import shutil
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import workdir as configs_workdir
from diffusion import adopt, compat, evaluate, experiment, generate, publish, sampler, train
from diffusion.experiment import RunError
from diffusion.interop import ddim, diffusers, tensors
from tests.test_generate import make_run, random_params
from tests.test_hosts import hosts, said, wait
from tests.test_main import assert_refused, main
from tests.test_train import tiny

FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'pipeline'
WEIGHTS = 'unet/diffusion_pytorch_model.safetensors'


def import_to(workdir, source, changes=None):
    """Run --mode=import; the config beside it is a tiny one for digits."""
    assert adopt.run(tiny({'interop.source': source} | (changes or {})), str(workdir)) == 0


def config_of(workdir, **changes):
    config = configs_workdir.get_config(str(workdir))
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('imported') / 'run'
    import_to(workdir, f'diffusers:{FIXTURE}')
    return workdir


@pytest.fixture(scope='module')
def expected():
    with np.load(FIXTURE / 'expected.npz') as arrays:
        return dict(arrays)


# ── What diffusers says ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope='module')
def net(workdir):
    exp = experiment.build(config_of(workdir))
    _, params = experiment.load_params(exp, config_of(workdir), str(workdir), 'ema')
    return jax.jit(exp.network.net(params)), exp


def test_the_network_says_what_theirs_does(net, expected):
    """At our level t what theirs says at timestep t − 1; between two levels as well."""
    output = net[0](expected['x'], expected['t'] + 1)
    assert np.linalg.norm(output - expected['output']) < 1e-5 * np.linalg.norm(expected['output'])
    real = net[0](expected['x'], (expected['t'] + 1).astype(np.float32))
    np.testing.assert_allclose(real, output, atol=1e-6)
    assert np.abs(net[0](expected['x'], expected['t']) - expected['output']).max() > 1e-3


def test_the_images_are_theirs(net, expected):
    """DDIM in 10 steps as diffusers does it by default; and our default, which derives ε̂ again, draws others."""
    asked = dict(num_steps=10, spacing='leading', eta=0.0, variance='large')

    def draw(mode, variance='small'):
        how = compat.resolve(mode, 100, **asked | {'variance': variance}, clip=True)
        for key in ('num_steps', 'spacing'):
            del how[key]
        keys = jax.random.split(jax.random.key(0), 4)
        return np.asarray(
            jax.jit(
                lambda x_T: sampler.sample(keys, net[1].schedule, net[0], shape=(8, 8, 1), kind='eps', x_T=x_T, **how)
            )(expected['x_T'])
        )

    np.testing.assert_allclose(draw('diffusers', 'large'), expected['ddim'], atol=1e-4)
    assert np.abs(draw('') - expected['ddim']).max() > 1e-2


# ── A workdir as any other ───────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_sampled_as_they_do_and_goes_back_as_it_came(tmp_path, workdir):
    workdir = shutil.copytree(workdir, tmp_path / 'run')
    config = config_of(workdir, sample__num_images=2, sample__num_steps=4, sample__compat='diffusers')
    assert (config.schedule.T, config.sample.variance, config.sample.spacing) == (100, 'large', 'leading')
    assert generate.run(config, str(workdir)) == 0
    ((record,)) = workdir.glob('samples/step0-ema-eta1-4leading-large-as-diffusers-*/record.json')
    record = json.loads(record.read_text())
    assert record['timesteps'] == [76, 51, 26, 1, 0] and record['compat'] == 'diffusers'

    assert publish.run(config_of(workdir), str(workdir)) == 0
    folder = workdir / 'export' / 'step0-ema'
    back, there = load_file(folder / WEIGHTS), load_file(FIXTURE / WEIGHTS)
    assert back.keys() == there.keys() and all((back[name] == there[name]).all() for name in there)
    card = (folder / 'README.md').read_text()
    assert card.startswith('---\nlibrary_name: diffusers\n')
    for fact in (record['params_sha256'], 'model.multipliers | (1, 2)', 'grid.png', "compat 'diffusers'"):
        assert fact in card
    assert str(FIXTURE) not in card and 'data_dir' not in card  # where it lay is nobody's business
    assert (folder / 'grid.png').read_bytes() == next(workdir.glob('samples/*/grid.png')).read_bytes()


@pytest.mark.slow
def test_it_is_scored_and_trained_on(tmp_path, workdir):
    workdir = shutil.copytree(workdir, tmp_path / 'run')
    likelihood = dict(likelihood__num_images=2, likelihood__num_steps=3, likelihood__samples=1)
    assert evaluate.run(config_of(workdir, **likelihood), str(workdir)) == 0
    assert publish.run(config_of(workdir), str(workdir)) == 0
    folder = workdir / 'export' / 'step0-ema'
    assert json.loads((folder / 'ledger.json').read_text())['rows']
    assert 'bits/dim' in (folder / 'README.md').read_text()

    there = load_file(FIXTURE / WEIGHTS)
    tuned = dict(train__num_steps=2, train__batch_size=4, train__checkpoint_every=1)
    assert train.run(config_of(workdir, **tuned), str(workdir)) == 0
    assert publish.run(config_of(workdir), str(workdir)) == 0
    tuned = load_file(workdir / 'export' / 'step2-ema' / WEIGHTS)
    assert any((tuned[name] != there[name]).any() for name in there)
    assert not (workdir / 'export' / 'step2-ema' / 'ledger.json').exists()  # that is what other weights say


def test_a_workdir_that_holds_a_run_is_left_alone(tmp_path, workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
    with pytest.raises(RunError, match='holds a run already'):
        import_to(workdir, f'diffusers:{FIXTURE}')
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*')} == before


def test_an_import_that_came_to_no_end_is_done_again(tmp_path, workdir, monkeypatch):
    """As its config.json comes last; also where the disk was full, which is no crash."""
    shutil.copytree(workdir, tmp_path / 'run')
    (tmp_path / 'run' / 'config.json').unlink()
    (tmp_path / 'run' / 'checkpoints' / '0.orbax-checkpoint-tmp').mkdir()
    (tmp_path / 'full').mkdir()
    free = shutil.disk_usage(tmp_path)._replace(free=0)
    with monkeypatch.context() as full, pytest.raises(RunError, match=r'full/checkpoints could not be written \(.* MB'):
        full.setattr(shutil, 'disk_usage', lambda path: free)
        import_to(tmp_path / 'full', f'diffusers:{FIXTURE}')
    assert not (tmp_path / 'full' / 'config.json').exists()
    for name in ('run', 'full'):
        import_to(tmp_path / name, f'diffusers:{FIXTURE}')
        for file in ('config.json', 'import.json'):
            assert (tmp_path / name / file).read_text() == (workdir / file).read_text()
        assert [path.name for path in (tmp_path / name / 'checkpoints').iterdir()] == ['0']


@pytest.mark.parametrize('imported', [False, True])
def test_checkpoints_of_a_training_are_left_alone(imported, tmp_path):
    """Also where its config.json was lost, whether it began with an import or not."""
    config = tiny()
    params = random_params(config, 1)
    make_run(tmp_path, config, 5, params=params)
    (tmp_path / 'config.json').unlink()
    if imported:
        (tmp_path / 'import.json').write_text('{}')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    with pytest.raises(RunError, match=r'holds a run already \(there is checkpoints\)'):
        import_to(tmp_path, f'diffusers:{FIXTURE}')
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before


@pytest.mark.slow
def test_on_several_hosts(tmp_path):
    """Two of them, each with half of the parameters: imported, and exported as they came."""
    workdir = tmp_path / 'run'

    def both(*flags, **changes):
        with hosts(2, 1, workdir, 'off', *flags, **changes) as processes:
            assert wait(processes, workdir) == [0, 0], said(workdir) + said(workdir, 1)

    both('--mode=import', f'--config.interop.source=diffusers:{FIXTURE}')
    assert 'the other modes know it as' in said(workdir) and 'the other modes' not in said(workdir, 1)
    stored = json.loads((workdir / 'config.json').read_text())
    here = {
        f'{part}__{key}': tuple(value) if isinstance(value, list) else value
        for part in ('model', 'schedule')
        for key, value in stored[part].items()
    }
    both('--mode=export', **here)
    back, there = load_file(workdir / 'export' / 'step0-ema' / WEIGHTS), load_file(FIXTURE / WEIGHTS)
    assert back.keys() == there.keys() and all((back[name] == there[name]).all() for name in there)


def test_on_the_command_line(tmp_path, capsys):
    """What is printed at the end is the config that the other modes take."""
    import_to(tmp_path / 'run', f'diffusers:{FIXTURE}')
    flags = [word for word in capsys.readouterr().out.split() if word.startswith('--')]
    done = main(*flags, '--mode=export')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run' / 'export' / 'step0-ema' / 'model_index.json').exists()
    assert_refused(main('--config=configs/workdir.py:nowhere', '--workdir=nowhere'), 'nowhere/config.json')


@pytest.mark.parametrize('name', ['', 'step0-ema/unet/diffusion_pytorch_model.safetensors', 'step0-ema/README.md'])
def test_an_export_that_cannot_be_written_is_one_line(workdir, tmp_path, name):
    """A file lies where a folder would, or a folder where a file would."""
    run = shutil.copytree(workdir, tmp_path / 'run', ignore=shutil.ignore_patterns('export'))
    (run / 'export' / name).mkdir(parents=True)
    if not name:
        (run / 'export').rmdir()
        (run / 'export').write_text('not a folder')
    with pytest.raises(RunError, match=r'/export/step0-ema cannot be written to .*--workdir'):
        publish.run(config_of(run), str(run))


def test_a_run_of_ones_own_pictures_is_exported_without_their_folders(tmp_path):
    """Though the config leaves open what they are; and its config.json is a config, whatever else it tells."""
    pictures = tmp_path / 'private' / 'cats'
    pictures.mkdir(parents=True)
    config = tiny({'data.source': f'folder:{pictures}', 'data.cache_dir': str(tmp_path / 'private')})
    params = random_params(config, 1)
    make_run(tmp_path / 'run', config, 1, params=params, ema=params)
    path = tmp_path / 'run' / 'config.json'
    images = {'count': 3, 'fingerprint': 'of cats', 'sha256': '0', 'channel_means': [1.0]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {'images': images}))
    config = config_of(tmp_path / 'run', data__image_size=0)
    assert publish.run(config, str(tmp_path / 'run')) == 0
    card = (tmp_path / 'run' / 'export' / 'step1-ema' / 'README.md').read_text()
    assert 'private' not in card and 'folder:cats' in card and '| data.image_size | 8 |' in card


def changed(tmp_path, file, **changes):
    """A copy of the fixture with these keys in one of its JSON files."""
    folder = shutil.copytree(FIXTURE, tmp_path / 'theirs')
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('num_class_embeds', 10),
        ('class_embed_type', 'timestep'),
        ('resnet_time_scale_shift', 'scale_shift'),
        ('time_embedding_type', 'fourier'),
        ('time_embedding_dim', 64),
        ('flip_sin_to_cos', True),
        ('freq_shift', 0),
        ('block_out_channels', [4, 6]),
        ('norm_eps', 1e-5),
        ('act_fn', 'gelu'),
        ('downsample_padding', 1),
        ('downsample_type', 'resnet'),
        ('attention_head_dim', 4),
        ('attention_head_dim', [8, 8]),
        ('attn_norm_num_groups', 1),
        ('mid_block_type', None),
        ('mid_block_scale_factor', 2),
        ('add_attention', False),
        ('center_input_sample', True),
        ('down_block_types', ['DownBlock2D', 'SkipDownBlock2D']),
        ('up_block_types', ['AttnUpBlock2D', 'AttnUpBlock2D']),
        ('out_channels', 2),
        ('sample_size', [8, 16]),
        ('sample_size', None),
        ('sample_size', '8'),
        ('block_out_channels', []),
        ('block_out_channels', [4, '8']),
        ('layers_per_block', [1, 1]),
        ('norm_num_groups', None),
        ('dropout', 'none'),
        ('something_new', 1),
        ('_class_name', 'UNet2DConditionModel'),
    ],
)
def test_networks_that_are_not_ours(key, value, tmp_path):
    folder = changed(tmp_path, 'unet/config.json', **{key: value})
    with pytest.raises(RunError, match=r'config\.interop\.source: .*theirs.*: ') as error:
        import_to(tmp_path / 'run', f'diffusers:{folder}')
    assert key in str(error.value) and (key == 'up_block_types' or repr(value) in str(error.value))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('beta_end', -0.1),
        ('rescale_betas_zero_snr', True),
        ('beta_schedule', 'laplace'),
        ('variance_type', 'learned_range'),
        ('prediction_type', 'flow_prediction'),
        ('prediction_type', ['epsilon']),
        ('num_train_timesteps', 0),
        ('beta_end', [0.1]),
        ('clip_sample', 'yes'),
        ('thresholding', True),
        ('clip_sample_range', 2.0),
        ('steps_offset', 1),
        ('timestep_spacing', 'even'),
        ('snr_shift_scale', 3.0),
        ('_class_name', 'ScoreSdeVeScheduler'),
    ],
)
def test_schedulers_that_are_not_ours(key, value, tmp_path):
    folder = changed(tmp_path, 'scheduler/scheduler_config.json', **{key: value})
    with pytest.raises(RunError, match=r'config\.interop\.source: .*theirs.*: ') as error:
        import_to(tmp_path / 'run', f'diffusers:{folder}')
    assert key in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'in_channels': 4, 'out_channels': 4}, 'config.data.channels is 4'),
        ({'block_out_channels': [15, 30], 'norm_num_groups': 1}, 'config.model: channels is 15'),
    ],
)
def test_a_config_that_the_files_led_to(changes, words, tmp_path):
    """Its keys are none that the user has set, so the files are named; those that the user has set are not theirs."""
    folder = changed(tmp_path, 'unet/config.json', **changes)
    with pytest.raises(RunError, match=r'config\.interop\.source: .*/theirs: ') as error:
        import_to(tmp_path / 'run', f'diffusers:{folder}')
    assert words in str(error.value)
    with pytest.raises(RunError, match=r'^config\.mesh: '):
        import_to(tmp_path / 'run', f'diffusers:{FIXTURE}', {'mesh.fsdp': 3})


def test_a_long_value_is_shown_in_short(tmp_path):
    folder = changed(tmp_path, 'unet/config.json', block_out_channels=['8'] * 1000)
    with pytest.raises(RunError, match=r'block_out_channels is .* …, which') as error:
        import_to(tmp_path / 'run', f'diffusers:{folder}')
    assert len(str(error.value)) < 600


COSINE = np.cos((np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2
# What others may list instead of naming a schedule, and the keys of ours.
LISTED = {
    'linear': (np.linspace(1e-4, 0.02, 100), {'name': 'linear', 'beta_start': 1e-4, 'beta_end': 0.02}),
    'other ends': (np.linspace(1e-3, 0.2, 100), {'name': 'linear', 'beta_start': 1e-3, 'beta_end': 0.2}),
    'quadratic': (np.linspace(0.03, 0.11, 100) ** 2, {'name': 'quadratic', 'beta_start': 0.0009, 'beta_end': 0.0121}),
    'constant': (np.full(100, 0.01), {'name': 'constant', 'beta_end': 0.01}),
    'jsd': (1 / np.arange(100, 0, -1), {'name': 'jsd'}),
    'sigmoid': (1e-4 + 0.0199 / (1 + np.exp(-np.linspace(-6, 6, 100))), {'name': 'sigmoid', 'beta_end': 0.02}),
    'cosine': (np.minimum(1 - COSINE[1:] / COSINE[:-1], 0.999), {'name': 'cosine', 'offset': 0.008}),
}


@pytest.mark.parametrize('rounded', [np.float64, np.float32])
@pytest.mark.parametrize('name', LISTED)
def test_betas_that_are_those_of_a_schedule(name, rounded, tmp_path):
    betas, keys = LISTED[name]
    listed = [float(beta) for beta in betas.astype(rounded)]
    changes = {'trained_betas': listed, 'prediction_type': 'sample', 'beta_schedule': 'unheard of'}
    folder = changed(tmp_path, 'scheduler/scheduler_config.json', **changes)
    config, settings = adopt.merge(tiny(), diffusers.read(str(folder)), 'theirs')
    for key, value in keys.items():
        assert config.schedule[key] == (value if key == 'name' else pytest.approx(value, rel=1e-6))
    assert settings['schedule']['name'] == keys['name']  # as import.json will have it


@pytest.mark.parametrize(
    ('betas', 'words'),
    [
        (np.linspace(0.1, 0.2, 100) ** 3, ['100 from 0.001 to 0.008', 'sigmoid', 'config.schedule.offset=0.008']),
        ([0.1, 0.2], ['scheduler_config.json', '2 numbers', 'num_train_timesteps is 100']),
        ([0.1] * 99 + [1.5], ['scheduler_config.json', '(0, 1]']),
        ([0.1] * 50 + [1] + [0.1] * 49, ['β_51 is 1.0']),
        ([0.1] * 99 + ['0.1'], ['scheduler_config.json', 'numbers in (0, 1]']),
        ('linear', ['scheduler_config.json', 'numbers in (0, 1]']),
    ],
)
def test_betas_of_no_schedule(betas, words, tmp_path):
    folder = changed(
        tmp_path, 'scheduler/scheduler_config.json', trained_betas=betas if isinstance(betas, str) else list(betas)
    )
    with pytest.raises(RunError, match='trained_betas') as error:
        import_to(tmp_path / 'run', f'diffusers:{folder}')
    for word in (str(folder), *words):
        assert word in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    'changes',
    [
        {'sample_size': [8, 8]},
        {'attention_head_dim': 8},  # one head of 8 channels, as wide as all that attends
        {'act_fn': 'swish', 'attn_norm_num_groups': 2, 'time_embedding_dim': 16},
    ],
)
def test_other_words_for_the_same(changes, tmp_path):
    plain = diffusers.read(str(FIXTURE)).settings
    assert diffusers.read(str(changed(tmp_path, 'unet/config.json', **changes))).settings == plain


def test_what_a_scheduler_does_not_look_at(tmp_path):
    changes = {'clip_sample': False, 'clip_sample_range': 3.0, 'timestep_spacing': 'trailing', 'steps_offset': 1}
    folder = changed(tmp_path, 'scheduler/scheduler_config.json', **changes)
    sample = diffusers.read(str(folder)).settings['sample']
    assert (sample['clip'], sample['spacing']) == (False, 'trailing')


def test_the_config_of_the_google_ddpms():
    """google/ddpm-cifar10-32, as its folder has said since 2022."""
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
            'channels': 128, 'multipliers': (1, 2, 2, 2), 'num_blocks': 2, 'attention_resolutions': (16,),
            'groups': 32, 'dropout': 0.0, 'first_level': 0,
        },
    }  # fmt: skip


# ── Files that are not what they should be ───────────────────────────────────────────────────────────────────────────


def drop(arrays, name):
    del arrays[name]


def rename(arrays, name):
    arrays['another.' + name] = arrays.pop(name)


def replace(value):
    def change(arrays, name):
        arrays[name] = value(arrays[name])

    return change


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (drop, ['is missing', '(8, 4, 3, 3)']),
        (rename, ['is missing', 'another.', 'is not known']),
        (lambda arrays, name: arrays.update({'ema.' + name: arrays[name]}), ['ema.', 'is not known']),
        (replace(lambda tensor: tensor[:, :, 1:]), ['(8, 4, 2, 3)', '(8, 4, 3, 3) was expected']),
        (replace(lambda tensor: np.ascontiguousarray(tensor.swapaxes(0, 1))), ['(4, 8, 3, 3)', '(8, 4, 3, 3)']),
        (replace(lambda tensor: tensor.astype(np.int32)), ['int32']),
        (replace(lambda tensor: np.where(tensor == tensor[0, 0, 0, 0], np.nan, tensor)), ['nan']),
    ],
    ids=['missing', 'renamed', 'extra', 'cut', 'transposed', 'integers', 'nan'],
)
def test_a_tensor_that_is_wrong_is_named(change, words, tmp_path):
    folder, name = shutil.copytree(FIXTURE, tmp_path / 'theirs'), 'down_blocks.1.resnets.0.conv1.weight'
    arrays = load_file(folder / WEIGHTS)
    change(arrays, name)
    save_file(arrays, folder / WEIGHTS)
    with pytest.raises(RunError) as error:
        import_to(tmp_path / 'run', f'diffusers:{folder}')
    for word in (name, str(folder), *words):
        assert word in str(error.value)
    assert not (tmp_path / 'run').exists()


def test_half_precision_becomes_float32(tmp_path, net):
    folder = shutil.copytree(FIXTURE, tmp_path / 'theirs')
    whole, expected = load_file(folder / WEIGHTS), net[1].abstract_state().params
    for dtype in (np.float16, jnp.bfloat16):
        save_file({name: tensor.astype(dtype) for name, tensor in whole.items()}, folder / WEIGHTS)
        found = diffusers.read(str(folder))
        params = tensors.take(found.weights['params'], expected, found.names, 'the file')
        kernel = whole['conv_out.weight'].astype(dtype).astype(np.float32).transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(params['conv_out']['kernel'], kernel)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_a_truncated_file(tmp_path):
    """The first tensor that is not whole is named; and a header that is cut, or senseless, is no crash."""
    folder = shutil.copytree(FIXTURE, tmp_path / 'theirs')
    whole = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack('<Q', whole[:8])
    header = json.loads(whole[8 : 8 + length])
    start, end = header['mid_block.resnets.0.conv1.weight']['data_offsets']
    for content, words in (
        (whole[: 8 + length + (start + end) // 2], 'it ends within mid_block.resnets.0.conv1.weight '),
        (whole[:100], 'cannot be read'),
        (whole[:8] + b'x' * (len(whole) - 8), 'cannot be read'),
        (b'', 'cannot be read'),
    ):
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(RunError, match=words) as error:
            import_to(tmp_path / 'run', f'diffusers:{folder}')
        assert str(folder / WEIGHTS) in str(error.value)


def test_a_type_that_numpy_does_not_have(tmp_path):
    folder = shutil.copytree(FIXTURE, tmp_path / 'theirs')
    header = json.dumps({'conv_out.bias': {'dtype': 'F8_E4M3', 'shape': [4], 'data_offsets': [0, 4]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack('<Q', len(header)) + header + bytes(4))
    with pytest.raises(RunError, match=r'holds conv_out\.bias as F8_E4M3, but floating-point') as error:
        import_to(tmp_path / 'run', f'diffusers:{folder}')
    assert str(folder / WEIGHTS) in str(error.value)


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
def test_convolutions_of_the_ddim_code_that_are_none(name, shape):
    shapes = {'conv_in.weight': (4, 3, 3, 3), 'down.0.block.0.conv1.weight': (4, 4, 3, 3), name: shape}
    with pytest.raises(ValueError, match=r'model\.ckpt is no network') as error:
        ddim.network_settings({name: np.ones(shape) for name, shape in shapes.items()}, 'model.ckpt', 8)
    assert f'{name} has the shape {shape}' in str(error.value)


def shard(folder):
    """The fixture's weights in two files; returns the index."""
    arrays = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(arrays)
    places = {}
    for i, part in enumerate((names[:20], names[20:])):
        file = f'diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors'
        save_file({name: arrays[name] for name in part}, folder / 'unet' / file)
        places |= dict.fromkeys(part, file)
    return {'metadata': {}, 'weight_map': places}


def test_weights_in_parts(tmp_path):
    folder = shutil.copytree(FIXTURE, tmp_path / 'theirs')
    index = shard(folder)
    name, file = next(iter(index['weight_map'].items()))
    path = folder / f'{WEIGHTS}.index.json'
    path.write_text(json.dumps(index))
    found = diffusers.read(str(folder)).weights['params']
    whole = load_file(FIXTURE / WEIGHTS)
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
            diffusers.read(str(folder))
    path.write_text('[')
    with pytest.raises(ValueError, match=r'index\.json cannot be read'):
        diffusers.read(str(folder))
    path.write_text(json.dumps(index))
    (folder / 'unet' / file).unlink()
    with pytest.raises(ValueError, match=f'{file} is missing'):
        diffusers.read(str(folder))


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / 'empty').mkdir()
    folder = shutil.copytree(FIXTURE, tmp_path / 'theirs')
    (folder / WEIGHTS).unlink()
    for source, words in (
        ('', "'diffusers:FOLDER'"),
        ('diffusers:', "'diffusers:FOLDER'"),
        ('torch:model.pt', "'torch:model.pt' should be"),
        (f'diffusers:{tmp_path / "empty"}', 'config.json cannot be read'),
        (f'diffusers:{folder}', 'unet has no diffusion_pytorch_model.safetensors'),
    ):
        with pytest.raises(RunError, match=words):
            import_to(tmp_path / 'run', source)


@pytest.mark.parametrize('file', ['model.fp16.safetensors', 'model-00001-of-00002.bin', 'model.bin.index.json'])
def test_weights_by_another_name_are_told(file, tmp_path):
    folder = shutil.copytree(FIXTURE, tmp_path / 'theirs')
    (folder / WEIGHTS).rename(folder / 'unet' / f'diffusion_pytorch_{file}')
    with pytest.raises(RunError, match=rf'has no {WEIGHTS[5:]}, but diffusion_pytorch_{file}: save'):
        import_to(tmp_path / 'run', f'diffusers:{folder}')


def test_without_a_scheduler_the_config_says_how(tmp_path):
    import_to(tmp_path / 'run', f'diffusers:{FIXTURE / "unet"}', {'schedule.T': 30, 'sample.eta': 0.5})
    config = config_of(tmp_path / 'run')
    assert (config.schedule.T, config.sample.eta, config.model.channels) == (30, 0.5, 4)


# ── What is not installed, and the hub ───────────────────────────────────────────────────────────────────────────────


def test_pytorch_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    folder = shutil.copytree(FIXTURE, tmp_path / 'theirs')
    (folder / WEIGHTS).rename(folder / 'unet' / 'diffusion_pytorch_model.bin')
    for source in (f'diffusers:{folder}', f'ddim:{tmp_path / "model.ckpt"}'):
        with pytest.raises(RunError, match='is not installed: pip install torch'):
            import_to(tmp_path / 'run', source)


def test_the_hub(tmp_path, monkeypatch):
    """Without its library, and where it cannot be reached. What it gives is a folder, read as others are."""
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(RunError, match=r'google/ddpm is no folder here; .* pip install huggingface_hub'):
        import_to(tmp_path / 'run', 'diffusers:google/ddpm')

    asked = []

    class Hub:
        def snapshot_download(self, repo, allow_patterns):
            asked.append((repo, allow_patterns))
            if repo == 'google/ddpm':
                raise ConnectionError('no\n\nnetwork')
            return str(FIXTURE)

    monkeypatch.setitem(sys.modules, 'huggingface_hub', Hub())
    with pytest.raises(RunError, match=r'google/ddpm is no folder here, nor .* \(ConnectionError: no network\)'):
        import_to(tmp_path / 'run', 'diffusers:google/ddpm')
    assert diffusers.read('someone/digits').settings == diffusers.read(str(FIXTURE)).settings
    assert [repo for repo, _ in asked] == ['google/ddpm', 'someone/digits']
    assert not any('bin' in pattern for _, patterns in asked for pattern in patterns)


# ── Back ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_diffusers_cannot_express(tmp_path):
    config = tiny({'model.multipliers': (2,)})
    params = random_params(config, 1)
    make_run(tmp_path, config, 1, params=params, ema=params)
    with pytest.raises(RunError, match=r'config\.model: multipliers is \(2,\)'):
        publish.run(config, str(tmp_path))
    assert not (tmp_path / 'export').exists()


@pytest.mark.parametrize(
    ('spacing', 'words'),
    [
        ('leading', None),
        ('trailing', None),
        ('linspace', "Of 'linspace' the DDIM of diffusers"),
        ('quad', "'quad', is none of diffusers'"),
    ],
)
def test_the_card_says_where_the_pipelines_go_other_ways(spacing, words, tmp_path):
    config = tiny({'sample.spacing': spacing})
    params = random_params(config, 1)
    make_run(tmp_path, config, 1, params=params, ema=params)
    assert publish.run(config, str(tmp_path)) == 0
    card = (tmp_path / 'export' / 'step1-ema' / 'README.md').read_text()
    assert (words or '```\n\n## Record') in card


@pytest.mark.parametrize(
    ('changes', 'their_name'),
    [
        ({'name': 'quadratic'}, 'scaled_linear'),
        ({'name': 'cosine'}, 'squaredcos_cap_v2'),
        ({'name': 'cosine', 'offset': 0.01}, None),
        ({'name': 'sigmoid'}, None),  # of DDPMScheduler alone
        ({'name': 'constant'}, None),
        ({'name': 'jsd'}, None),
    ],
)
def test_schedules_by_name_or_by_their_betas(changes, their_name, tmp_path):
    """And what was exported is imported as it was; the offset of an own cosine, which no file tells, is asked."""
    changes = {f'schedule.{key}': value for key, value in changes.items()}
    config = tiny(changes | {'model.kind': 'v'})
    params = random_params(config, 1)
    make_run(tmp_path, config, 1, params=params, ema=params)
    assert publish.run(config, str(tmp_path)) == 0
    path = tmp_path / 'export' / 'step1-ema' / 'scheduler' / 'scheduler_config.json'
    written = json.loads(path.read_text())
    if their_name:
        assert (written['beta_schedule'], written['trained_betas']) == (their_name, None)
    else:
        alpha_bar = np.cumprod(1 - np.array(written['trained_betas']))
        np.testing.assert_allclose(alpha_bar, experiment.build(config).schedule.alpha_bar(np.arange(1, 5)), rtol=1e-5)
    asked = {key: value for key, value in changes.items() if key == 'schedule.offset'}
    import_to(tmp_path / 'again', f'diffusers:{tmp_path / "export" / "step1-ema"}', asked)
    assert config_of(tmp_path / 'again').schedule.to_dict() == config.schedule.to_dict()
