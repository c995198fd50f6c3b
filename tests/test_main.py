"""The command line: what is wrong is said in a line or two, without a traceback, and the exit status is not 0."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import default, digits

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = '--config=configs/digits.py'


def main(*flags, **environment):
    """Run main.py to its end."""
    return subprocess.run(
        [sys.executable, 'main.py', *flags],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_refused(done, *words):
    """The process said what is wrong, with these words in it, and failed."""
    output = done.stdout + done.stderr
    assert done.returncode not in (0, 75), output
    assert 'Traceback' not in output, output
    for word in words:
        assert word in output, output


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
        ((CONFIG, '--mode=smaple'), ('smaple', 'train', 'sample')),
        ((CONFIG, '--workdri=elsewhere'), ('workdri', 'workdir')),
        ((CONFIG, 'runs/digits'), ('runs/digits',)),
        (('--config=configs/digit.py',), ('configs/digit.py',)),
        (('--config', 'configs/digit.py'), ('configs/digit.py',)),
        (('--config=configs',), ('configs',)),
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


def test_a_missing_workdir_is_named():
    assert_refused(main(CONFIG), '--workdir')


def test_a_run_of_another_network_is_refused(tmp_path):
    """At the command line; what counts as another run is for test_train.py."""
    config = digits.get_config()
    (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
    assert_refused(
        main(CONFIG, f'--workdir={tmp_path}', '--config.model.channels=64'),
        str(tmp_path),
        'config.model.channels: 32 there, 64 asked',
    )
    assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_a_place_that_is_no_folder_is_refused_for_what_it_is(tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    assert_refused(main(CONFIG, f'--workdir={tmp_path / "file" / "run"}'), f'{tmp_path / "file"} is a file')
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    assert_refused(main(CONFIG, f'--workdir={tmp_path / "link" / "run"}'), f'{tmp_path / "link"} is a broken link')
    assert_refused(main(CONFIG, '--workdir=gs://bucket/run'), 'gs://bucket/run', 'mount')
    assert not (ROOT / 'gs:').exists()
    assert_refused(main(CONFIG, '--workdir='), 'is no folder')


@pytest.mark.parametrize('flag', ['--help', '-help', '-?', '--helpfull', '--helpshort'])
def test_help_is_no_failure(flag):
    done = main(flag)
    assert (done.returncode, done.stderr) == (0, '') and '--workdir' in done.stdout


def test_a_path_of_the_user_is_understood(tmp_path):
    """~ is the home folder, here one without a run."""
    assert_refused(main(CONFIG, '--workdir=~/run', '--mode=sample', HOME=str(tmp_path)), str(tmp_path / 'run'), 'train')


def keys(config, prefix=''):
    for key, value in config.items():
        yield from keys(value, f'{prefix}{key}.') if hasattr(value, 'items') else [prefix + key]


def test_no_config_adds_a_key():
    """Every key stands in default.py; the fixed names of DESIGN.md §5 that this far exist are among them."""
    every = set(keys(default.get_config()))
    assert set(keys(digits.get_config())) == every
    assert {'seed', 'data.source', 'model.kind', 'schedule.T', 'train.ema_decay', 'sample.eta', 'mesh.fsdp'} <= every
    config = digits.get_config()
    with pytest.raises(AttributeError, match='batch_size'):
        config.train.batchsize = 4
