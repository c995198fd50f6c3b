"""The command line: an error is one or two lines without a traceback, and an exit status that is not 0."""

import json
import os
import signal
import subprocess
import sys

import pytest

from diffusion import cli, limits
from diffusion.configs import default, digits
from diffusion.networks import NETWORKS
from tests.runs import CONFIG, ROOT, assert_refused, main, make_run, random_params, tiny


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        ((CONFIG, '--config.train.batchsize=4'), ('config.train.batchsize', "'batch_size'")),
        ((CONFIG, '--config.trian.batch_size=4'), ('config.trian', "'train'")),
        ((CONFIG, '--config.sede=1'), ('config.sede', "'seed'")),
        ((CONFIG, '--config.zzz=1'), ('config.zzz', 'configs/default.py')),
        ((CONFIG, '--config.train.batch_size=8', '--config.schedule.t=4'), ('config.schedule.t=4', "'t'")),
        ((CONFIG, '--config.seed.x=1'), ('config.seed',)),
        ((CONFIG, '--config.train.batch_size=many'), ('config.train.batch_size', 'many')),
        ((CONFIG, '--config.train.num_steps=1.5'), ('config.train.num_steps', '1.5')),
        ((CONFIG, '--config.sample.clip=maybe'), ('config.sample.clip', 'maybe')),
        ((CONFIG, '--config.train=3'), ('config.train', '3')),
        ((CONFIG, '--config.train.batch-size=3'), ('config.train.batch-size=3', 'GROUP.KEY=VALUE')),
        ((CONFIG, '--config.sample.metrics[0]=KID'), ('config.sample.metrics[0]=KID', 'GROUP.KEY=VALUE')),
        (('--config=',), ('--config= is empty',)),
        ((CONFIG, '--mode=smaple'), ('smaple', 'train', 'sample')),
        ((CONFIG, '--workdri=elsewhere'), ('workdri', 'workdir')),
        ((CONFIG, 'runs/digits'), ('runs/digits',)),
        (('--config=configs/digit.py',), ('configs/digit.py',)),
        (('--config', 'configs/digit.py'), ('configs/digit.py',)),
        (('--config=configs',), ('configs',)),
        (('--config=digit',), ('digit', 'celeba', 'digits', 'imagenet64')),
        (('--config=configs/digits.py:foo',), ('configs/digits.py:foo', 'configs/workdir.py')),
        ((), ('--config',)),
    ],
    ids=lambda value: ' '.join(value).replace(CONFIG, '').strip() or 'none',
)
def test_wrong_flags_are_named(flags, words, tmp_path):
    done = main(f'--workdir={tmp_path / "run"}', *flags)
    assert_refused(done, *words)
    assert done.stdout == '' and len(done.stderr.splitlines()) <= 2, done.stderr
    assert not (tmp_path / 'run').exists()


OWN = """from diffusion.configs import default
def get_config():
    config = default.get_config()
    {line}
"""


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        ('def get_config(:\n', ('line 1', 'syntax')),
        ('import nowhere\n', ('line 1', "No module named 'nowhere'")),
        (OWN.format(line='config.train.batchsize = 4'), ('line 4', 'batchsize')),
        (OWN.format(line='return undefined'), ('line 4', "name 'undefined' is not defined")),
        (OWN.format(line='return None'), ('get_config() returns None',)),
        (OWN.format(line='return config.to_dict()'), ('returns a dict', 'ConfigDict')),
        (OWN.format(line='return config.train'), ('lacks', 'default.get_config()')),
        ('config = 3\n', ('no function get_config',)),
        ('get_config = 3\n', ("get_config: TypeError: 'int' object is not callable",)),
        (OWN.format(line='config.seed = 1 + None'), ('line 4', 'TypeError')),
    ],
)
def test_an_own_config_that_is_wrong_is_named_with_the_line(content, words, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(content)
    done = main(f'--config={path}', f'--workdir={tmp_path / "run"}')
    assert_refused(done, '--config', *words)
    assert done.stdout == '' and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_number_that_is_too_large_is_told_what_is_allowed():
    with pytest.raises(ValueError, match=r'config.seed is 99999999999, but must be 0 to 2147483647'):
        config = default.get_config()
        config.seed = 99_999_999_999
        limits.check(config)


def test_a_missing_workdir_is_named():
    assert_refused(main(CONFIG), '--workdir')


def test_a_config_is_found_by_its_name(tmp_path):
    """From any folder, with a space or an equals sign, with or without what follows a colon."""
    assert cli.find_config(['--config=digits']) == cli.find_config([f'--config={cli.CONFIGS}/digits.py'])
    found, path = cli.find_config(['main.py', '-config', 'workdir:runs/x', '--mode=sample'])
    assert path == f'{cli.CONFIGS}/workdir.py:runs/x' and found == ['main.py', '-config', path, '--mode=sample']
    assert cli.find_config(['--config=configs/nowhere.py']) == (['--config=configs/nowhere.py'], 'configs/nowhere.py')
    assert cli.find_config(['--config=own/mine.py:x']) == (['--config=own/mine.py:x'], 'own/mine.py:x')
    assert cli.find_config(['--mode=train', '--config']) == (['--mode=train', '--config'], '')
    done = subprocess.run(
        [sys.executable, ROOT / 'main.py', '--config=digits', f'--workdir={tmp_path}', '--config.train.batchsize=4'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert_refused(done, "did you mean 'batch_size'")


def test_a_checkout_s_path_of_a_config_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.find_config(['--config=configs/workdir.py:W'])[1] == f'{cli.CONFIGS}/workdir.py:W'
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'digits.py').write_text('')
    assert cli.find_config(['--config=configs/digits.py'])[1] == 'configs/digits.py'  # one's own


@pytest.mark.slow
def test_a_workdir_with_a_run_needs_no_config(tmp_path):
    """Its data, network and schedule are the run's, in any folder; the mode's settings may be given beside it."""
    config = tiny()
    params = random_params(config, 1)
    make_run(tmp_path / 'run', config, 5, params=params, ema=params)
    assert_refused(main(f'--workdir={tmp_path}', '--mode=export'), '--config')
    command = [sys.executable, ROOT / 'main.py', '--workdir=run', '--mode=export', '--config.interop.weights=raw']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    network = json.loads((tmp_path / 'run' / 'export' / 'step5-raw' / 'unet' / 'config.json').read_text())
    assert network['block_out_channels'] == [config.model.channels]


def test_the_names_of_configs_are_those_of_the_files():
    assert set(cli.config_names()) >= {'digits', 'celeba', 'workdir', 'default'}
    assert set(cli.config_names()) == {path.stem for path in (ROOT / 'configs').glob('*.py')} - {'__init__'}


@pytest.mark.slow
def test_a_run_of_another_network_is_refused_in_a_few_lines(tmp_path):
    config = digits.get_config()
    (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
    assert_refused(
        main(CONFIG, f'--workdir={tmp_path}', '--config.model.channels=64'),
        str(tmp_path),
        'config.model.channels: 32 there, 64 asked',
    )
    assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_a_workdir_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    assert_refused(main(CONFIG, f'--workdir={tmp_path / "file" / "run"}'), f'{tmp_path / "file"} is a file')
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    assert_refused(main(CONFIG, f'--workdir={tmp_path / "link" / "run"}'), f'{tmp_path / "link"} is a broken link')
    assert_refused(main(CONFIG, '--workdir=gs://bucket/run'), 'gs://bucket/run', 'mount')
    assert not (ROOT / 'gs:').exists()
    assert_refused(main(CONFIG, '--workdir='), 'is not a folder')


@pytest.mark.parametrize('how', ['| head -1', '>&-', '>&- 2>&-', '2>&1 >/dev/full', ''])
def test_output_that_is_closed_full_or_not_in_utf_8_is_no_failure(how):
    """The help has letters that latin-1 lacks."""
    command = f'set -o pipefail; "{sys.executable}" main.py --help {how}'
    environment = os.environ | {'PYTHONIOENCODING': 'latin-1'}
    done = subprocess.run(['bash', '-c', command], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b''), done


@pytest.mark.parametrize('module', ['diffusion.modes.train', 'diffusion.modes'])
def test_a_module_that_is_no_program_does_not_succeed(module):
    done = subprocess.run([sys.executable, '-m', module], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == '' and done.stderr.count('\n') == 1
    assert 'diffusion --mode=NAME' in done.stderr


@pytest.mark.parametrize('flag', ['--help', '-help', '-?', '-h', '--helpfull', '--helpshort'])
def test_help_is_no_failure(flag):
    done = main(flag)
    assert (done.returncode, done.stderr) == (0, '') and '--workdir' in done.stdout


def test_help_lists_modes_configs_and_every_key_with_its_default_and_comment():
    text = cli.help_text()
    for word in (*cli.MODES, *cli.config_names()):
        assert word in text
    documented = {key: (value, comment) for key, value, comment in cli.documented_keys()}
    assert set(documented) == set(keys(default.get_config()))
    for key, (value, comment) in documented.items():
        shown = f'--config.{key}={value}\n      {comment}' in text
        assert shown != key.startswith('command.')  # which the command line sets itself
        assert len(comment) > 3, key


def test_help_lists_the_keys_of_the_tables_without_importing_jax(monkeypatch):
    """Each table as it is imported, against the help of a process that imports none of them."""
    monkeypatch.delitem(NETWORKS, 'two layers', raising=False)  # of other tests
    program = (
        'import sys\n'
        'from diffusion import cli\n'
        'text = cli.help_text()\n'
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules), sorted(sys.modules)\n"
        'print(text)\n'
    )
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for key, limit in limits.LIMITS.items():
        if isinstance(limit, (limits.OneOf, limits.SomeOf)):
            (text,) = (part for part in done.stdout.split('  --config.') if part.startswith(f'{key}='))
            assert f'({limit})' in text  # str(limit) imports the table


@pytest.mark.slow
def test_a_path_of_the_user_is_understood(tmp_path):
    """~ is the home folder, here one without a run."""
    assert_refused(main(CONFIG, '--workdir=~/run', '--mode=sample', HOME=str(tmp_path)), str(tmp_path / 'run'), 'train')


def keys(config, prefix=''):
    for key, value in config.items():
        yield from keys(value, f'{prefix}{key}.') if hasattr(value, 'items') else [prefix + key]


def test_no_config_adds_a_key():
    """Every key is in default.py, with the names that DESIGN.md §5 fixes."""
    every = set(keys(default.get_config()))
    assert set(keys(digits.get_config())) == every
    assert {'seed', 'data.source', 'model.kind', 'schedule.T', 'train.ema_decay', 'sample.eta', 'mesh.fsdp'} <= every
    config = digits.get_config()
    with pytest.raises(AttributeError, match='batch_size'):
        config.train.batchsize = 4


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_while_jax_is_imported_ends_the_command_in_one_line(number, tmp_path):
    command = [sys.executable, 'main.py', CONFIG, f'--workdir={tmp_path / "run"}', '--mode=data']
    pipes = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as process:
        try:
            assert process.stdout.readline() == 'loading JAX …\n'
            process.send_signal(number)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output) == (75, '')
    assert errors == '\ninterrupted: nothing is written yet; the same command starts over\n'
