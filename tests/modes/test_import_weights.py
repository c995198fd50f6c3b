"""--mode=import_weights: a pipeline of diffusers becomes an ordinary workdir, without diffusers and PyTorch."""

import functools
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion import build, compat, sampler, workdir
from diffusion.configs import workdir as configs_workdir
from diffusion.interop import ddim, diffusers
from diffusion.interop.tensors import Found
from diffusion.modes import export, import_weights, likelihood, sample, train
from diffusion.util import RunError
from tests.interop import fixture
from tests.interop.fixture import PIPELINE, WEIGHTS
from tests.runs import assert_refused, main, make_run, random_params, tiny
from tests.several_hosts import hosts, printed, wait

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})  # compiles in a third


def import_to(path, source, changes=None):
    """Run the mode with a tiny config for the digits."""
    assert import_weights.run(tiny({'interop.source': source} | (changes or {})), str(path)) == 0


def config_of(path, **changes):
    """The config that a workdir holds, with changes; in their names, __ stands for the dot."""
    config = configs_workdir.get_config(str(path))
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return config


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
    path = tmp_path_factory.mktemp('imported') / 'run'
    import_to(path, f'diffusers:{PIPELINE}')
    return path


@pytest.fixture(scope='module')
def expected():
    with np.load(PIPELINE / 'expected.npz') as arrays:
        return dict(arrays)


# What diffusers computes


@pytest.fixture(scope='module')
def exp_and_net(imported):
    config = config_of(imported)
    exp = build.build(config)
    _, params = workdir.load_params(exp.abstract_state(), config, str(imported), 'ema')
    return exp, exp.network.net(params)


def test_the_network_computes_what_theirs_does(exp_and_net, expected):
    """At our level t, what theirs computes at timestep t − 1; real levels are allowed, too."""
    _, net = exp_and_net
    both = jit(lambda x, t: (net(x, t), net(x, t.astype(np.float32))))
    output, real = both(expected['x'], expected['t'] + 1)
    assert np.linalg.norm(output - expected['output']) < 1e-5 * np.linalg.norm(expected['output'])
    np.testing.assert_allclose(real, output, atol=1e-6)
    assert np.abs(both(expected['x'], expected['t'])[0] - expected['output']).max() > 1e-3


def test_the_images_are_theirs(exp_and_net, expected):
    """DDIM in 10 steps as in diffusers; our own default, which derives ε̂ again after clipping, draws others."""
    exp, net = exp_and_net
    asked = dict(num_steps=10, spacing='leading', eta=0.0, variance='large')

    def draw(mode, variance='small'):
        how = compat.resolve(mode, 100, **asked | {'variance': variance}, clip=True)
        for key in ('num_steps', 'spacing'):
            del how[key]
        keys = jax.random.split(jax.random.key(0), 4)
        return np.asarray(
            jit(lambda x_T: sampler.sample(keys, exp.schedule, net, shape=(8, 8, 1), kind='eps', x_T=x_T, **how))(
                expected['x_T']
            )
        )

    np.testing.assert_allclose(draw('diffusers', 'large'), expected['ddim'], atol=1e-4)
    assert np.abs(draw('') - expected['ddim']).max() > 1e-2


# A workdir as any other


@pytest.mark.slow
def test_it_can_be_sampled_and_exported_as_it_came(tmp_path, imported):
    path = shutil.copytree(imported, tmp_path / 'run')
    config = config_of(path, sample__num_images=2, sample__num_steps=4, sample__compat='diffusers')
    assert (config.schedule.T, config.sample.variance, config.sample.spacing) == (100, 'auto', 'leading')
    assert sample.run(config, str(path)) == 0
    ((record,)) = path.glob('samples/step0-ema-eta1-4leading-large-as-diffusers-*/record.json')
    record = json.loads(record.read_text())
    assert record['timesteps'] == [76, 51, 26, 1, 0] and record['compat'] == 'diffusers'

    assert export.run(config_of(path), str(path)) == 0
    folder = path / 'export' / 'step0-ema'
    back, there = load_file(folder / WEIGHTS), load_file(PIPELINE / WEIGHTS)
    assert back.keys() == there.keys() and all((back[name] == there[name]).all() for name in there)
    card = (folder / 'README.md').read_text()
    assert card.startswith('---\nlibrary_name: diffusers\n')
    for fact in (record['params_sha256'], 'model.multipliers | (1, 2)', 'grid.png', "compat 'diffusers'"):
        assert fact in card
    assert str(PIPELINE) not in card and 'data_dir' not in card  # the card is public, this machine's folders are not
    assert (folder / 'grid.png').read_bytes() == next(path.glob('samples/*/grid.png')).read_bytes()


@pytest.mark.slow
def test_it_can_be_scored_and_trained_on(tmp_path, imported):
    path = shutil.copytree(imported, tmp_path / 'run')
    few = dict(likelihood__num_images=2, likelihood__num_steps=3, likelihood__samples=1)
    assert likelihood.run(config_of(path, **few), str(path)) == 0
    assert export.run(config_of(path), str(path)) == 0
    folder = path / 'export' / 'step0-ema'
    assert json.loads((folder / 'ledger.json').read_text())['rows']
    assert 'bits/dim' in (folder / 'README.md').read_text()

    there = load_file(PIPELINE / WEIGHTS)
    tuned = dict(train__num_steps=2, train__batch_size=4, train__checkpoint_every=1)
    assert train.run(config_of(path, **tuned), str(path)) == 0
    assert export.run(config_of(path), str(path)) == 0
    tuned = load_file(path / 'export' / 'step2-ema' / WEIGHTS)
    assert any((tuned[name] != there[name]).any() for name in there)
    assert not (path / 'export' / 'step2-ema' / 'ledger.json').exists()  # that ledger belongs to other weights


@pytest.mark.slow
def test_on_several_hosts(tmp_path):
    """Two hosts, each with half of the parameters: imported, and exported as they came."""
    path = tmp_path / 'run'

    def both(*flags, **changes):
        with hosts(2, 1, path, *flags, mesh__fsdp=2, **changes) as processes:
            assert wait(processes, path) == [0, 0], printed(path) + printed(path, 1)

    theirs = dict(model__channels=4, model__groups=2, model__multipliers=(1, 2), model__attention_resolutions=(4,))
    theirs |= dict(schedule__T=100, schedule__beta_start=1e-4, schedule__beta_end=0.02)
    both('--mode=import_weights', f'--config.interop.source=diffusers:{PIPELINE}', **theirs)
    assert 'the other modes use it with' in printed(path) and 'the other modes' not in printed(path, 1)
    stored = json.loads((path / 'config.json').read_text())
    settings = {
        f'{part}__{key}': tuple(value) if isinstance(value, list) else value
        for part in ('model', 'schedule')
        for key, value in stored[part].items()
    }
    both('--mode=export', **settings)
    back, there = load_file(path / 'export' / 'step0-ema' / WEIGHTS), load_file(PIPELINE / WEIGHTS)
    assert back.keys() == there.keys() and all((back[name] == there[name]).all() for name in there)


@pytest.mark.slow
def test_the_flags_that_are_printed_are_those_of_the_other_modes(tmp_path, capsys):
    import_to(tmp_path / 'run', f'diffusers:{PIPELINE}')
    flags = [word for word in capsys.readouterr().out.split() if word.startswith('--')]
    done = main(*flags, '--mode=export')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run' / 'export' / 'step0-ema' / 'model_index.json').exists()
    assert_refused(main('--config=configs/workdir.py:nowhere', '--workdir=nowhere'), 'nowhere/config.json')


# A workdir that is not empty


def contents(path):
    return {entry: entry.stat().st_mtime_ns for entry in path.rglob('*')}


def test_a_run_is_left_alone(imported):
    before = contents(imported)
    with pytest.raises(RunError, match='holds a run already'):
        import_to(imported, f'diffusers:{PIPELINE}')
    assert contents(imported) == before


@pytest.mark.parametrize('began_with_an_import', [False, True])
def test_checkpoints_without_a_config_are_left_alone(began_with_an_import, tmp_path):
    config = tiny()
    params = random_params(config, 1)
    make_run(tmp_path, config, 5, params=params, ema=params)
    (tmp_path / 'config.json').unlink()
    if began_with_an_import:
        (tmp_path / 'import.json').write_text('{}')
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r'holds a run already .*checkpoints'):
        import_to(tmp_path, f'diffusers:{PIPELINE}')
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_an_unfinished_import_is_repeated(tmp_path, imported, monkeypatch):
    """It has no config.json, which is written last: here after a crash, and then because the disk was full."""
    path = shutil.copytree(imported, tmp_path / 'run')
    (path / 'config.json').unlink()
    (path / 'checkpoints' / '0.orbax-checkpoint-tmp').mkdir()
    free = shutil.disk_usage(tmp_path)._replace(free=0)
    with monkeypatch.context() as full, pytest.raises(RunError, match=r'run/checkpoints could not be written \(.* MB'):
        full.setattr(shutil, 'disk_usage', lambda path: free)
        import_to(path, f'diffusers:{PIPELINE}')
    assert not (path / 'config.json').exists()
    import_to(path, f'diffusers:{PIPELINE}')
    for file in ('config.json', 'import.json'):
        assert (path / file).read_text() == (imported / file).read_text()
    assert [entry.name for entry in (path / 'checkpoints').iterdir()] == ['0']


# Files that cannot be imported


def assert_not_imported(tmp_path, source, *words, **changes):
    """The import is refused with these words, and leaves nothing."""
    with pytest.raises(RunError, match=r'^config\.interop\.source: ') as error:
        import_to(tmp_path / 'run', source, changes)
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / 'run').exists()


def test_sources_that_name_no_project_or_no_place(tmp_path):
    for source in ('', 'diffusers:', 'torch:model.pt'):
        assert_not_imported(tmp_path, source, f'{source!r} must be', "'diffusers:FOLDER'", 'diffusers, openai, ddim')


@pytest.mark.parametrize(
    ('file', 'key', 'value'),
    [
        (fixture.NETWORK, 'class_embed_type', 'timestep'),  # refused by the reader
        (fixture.NETWORK, 'dropout', 'none'),  # of a type that the config does not accept
        (fixture.SCHEDULER, 'beta_end', [0.1]),
        (fixture.SCHEDULER, 'beta_end', -0.1),  # outside the limits of the key
    ],
)
def test_settings_that_are_not_ours(file, key, value, tmp_path):
    folder = fixture.changed(tmp_path, file, **{key: value})
    assert_not_imported(tmp_path, f'diffusers:{folder}', 'theirs', key, repr(value))


def test_weights_that_are_not_ours(tmp_path):
    folder = fixture.copy(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors['conv_in.bias'] = tensors['conv_in.bias'][:-1]
    save_file(tensors, folder / WEIGHTS)
    assert_not_imported(tmp_path, f'diffusers:{folder}', 'theirs', 'conv_in.bias', '(3,)', '(4,)')


def test_pytorch_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    assert_not_imported(tmp_path, f'ddim:{tmp_path / "model.ckpt"}', 'model.ckpt', 'pip install torch')


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'in_channels': 4, 'out_channels': 4}, 'config.data.channels is 4'),
        ({'block_out_channels': [15, 30], 'norm_num_groups': 1}, 'config.model: channels is 15'),
    ],
)
def test_the_files_are_named_if_their_settings_are_at_fault(changes, words, tmp_path):
    """The user has not set these keys. For a key that the user has set, the files are not named."""
    folder = fixture.changed(tmp_path, fixture.NETWORK, **changes)
    assert_not_imported(tmp_path, f'diffusers:{folder}', '/theirs: ', words)
    with pytest.raises(RunError, match=r'^config\.mesh: '):
        import_to(tmp_path / 'run', f'diffusers:{PIPELINE}', {'mesh.fsdp': 3})


# Settings


def test_without_a_scheduler_the_settings_are_those_of_the_config():
    config, settings = import_weights.merge(
        tiny({'schedule.T': 30, 'sample.eta': 0.5}), diffusers.read(str(PIPELINE / 'unet')), 'theirs'
    )
    assert (config.schedule.T, config.sample.eta, config.model.channels) == (30, 0.5, 4)
    assert set(settings) == {'data', 'model'}


def test_what_a_checkpoint_of_the_ddim_code_does_not_say_is_the_config_s():
    tensors = {'conv_in.weight': np.ones((32, 3, 3, 3)), 'down.0.block.0.conv1.weight': np.ones((32, 32, 3, 3))}
    found = Found(ddim.network_settings(tensors, 'model.ckpt', 8), {}, diffusers.names, {})
    config, _ = import_weights.merge(tiny({'schedule.name': 'quadratic', 'schedule.T': 500}), found, 'theirs')
    assert (config.schedule.name, config.schedule.T, config.model.kind) == ('quadratic', 500, 'eps')
    assert (config.model.channels, config.data.channels) == (32, 3)


def test_what_the_command_line_says_is_not_overridden_in_silence():
    """About sampling, it holds; about the network or its training, the files must agree."""
    config = tiny({'sample.num_steps': 3, 'schedule.T': 30})
    config.command.overrides = ('sample.num_steps',)
    found = diffusers.read(str(PIPELINE))
    merged, _ = import_weights.merge(config, found, 'theirs')
    assert (merged.sample.num_steps, merged.schedule.T) == (3, 100)
    assert 'schedule.T' in merged.command.overrides  # later commands need not repeat it
    config.command.overrides = ('schedule.T',)
    with pytest.raises(ValueError, match=r'config\.schedule\.T is 30, but the files of theirs say 100'):
        import_weights.merge(config, found, 'theirs')


def test_no_warning_is_about_a_key_that_only_the_files_state(tmp_path, capsys):
    """A linear schedule comes with the constants of a cosine one, which have no effect on it."""
    config = tiny({'interop.source': f'diffusers:{PIPELINE}', 'schedule.max_beta': 0.999})
    config.command.overrides = ('interop.source', 'schedule.max_beta')
    assert import_weights.run(config, str(tmp_path / 'run')) == 0
    said = capsys.readouterr().out
    assert 'config.schedule.max_beta has no effect' in said and 'schedule.offset' not in said
    stored = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert {'schedule.offset', 'schedule.max_beta'} <= set(stored['command']['overrides'])


COSINE = np.cos((np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2
# What files may list instead of naming a schedule, and the keys of ours.
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
def test_listed_betas_are_recognized_as_a_schedule(name, rounded, tmp_path):
    betas, keys = LISTED[name]
    listed = [float(beta) for beta in betas.astype(rounded)]
    changes = {'trained_betas': listed, 'prediction_type': 'sample', 'beta_schedule': 'unheard of'}
    folder = fixture.changed(tmp_path, fixture.SCHEDULER, **changes)
    config, settings = import_weights.merge(tiny(), diffusers.read(str(folder)), 'theirs')
    for key, value in keys.items():
        assert config.schedule[key] == (value if key == 'name' else pytest.approx(value, rel=1e-6))
    assert settings['schedule']['name'] == keys['name']  # import.json records it


@pytest.mark.parametrize(
    ('betas', 'words'),
    [
        (np.linspace(0.1, 0.2, 100) ** 3, ['100 from 0.001 to 0.008', 'sigmoid', 'config.schedule.offset=0.008']),
        ([0.1] * 50 + [1] + [0.1] * 49, ['β_51 is 1.0']),
    ],
)
def test_betas_of_no_schedule_are_refused(betas, words, tmp_path):
    folder = fixture.changed(tmp_path, fixture.SCHEDULER, trained_betas=list(betas))
    with pytest.raises(ValueError, match='theirs: trained_betas') as error:
        import_weights.merge(tiny(), diffusers.read(str(folder)), str(folder))
    assert all(word in str(error.value) for word in words)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    'changes',
    [
        {'name': 'quadratic'},
        {'name': 'cosine'},
        {'name': 'cosine', 'offset': 0.01},  # no file states the offset: it is asked again
        {'name': 'sigmoid'},
        {'name': 'constant'},
        {'name': 'jsd'},
    ],
)
def test_an_exported_schedule_is_imported_as_it_was(changes):
    changes = {f'schedule.{key}': value for key, value in changes.items()}
    config = tiny(changes | {'model.kind': 'v'})
    exp = build.build(config)
    written = json.loads(json.dumps(export.diffusers_scheduler(config, exp)))
    if written['trained_betas']:
        alpha_bar = np.cumprod(1 - np.array(written['trained_betas']))
        np.testing.assert_allclose(alpha_bar, exp.schedule.alpha_bar(np.arange(1, 5)), rtol=1e-5)
    settings = diffusers.scheduler_settings(written, 'scheduler_config.json')
    found = Found(settings, {}, diffusers.names, {}, written['trained_betas'])
    asked = {key: value for key, value in changes.items() if key == 'schedule.offset'}
    again, _ = import_weights.merge(tiny(asked), found, 'theirs')
    assert again.schedule.to_dict() == config.schedule.to_dict()
