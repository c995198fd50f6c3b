"""Whole training runs: what they leave on disk, and how they end, resume and recover."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.modes import train
from diffusion.runtime.interrupt import EXIT_STATUS
from diffusion.util import FileLock, RunError
from tests.runs import QUICK, ROOT, assert_bitwise, checkpoint, dotted, flags, main, metrics, quick, saved, tiny

LONG = 16  # steps of the unbroken run
RANDOM = {'model.dropout': 0.1, 'data.flip': True}  # a run with everything that is random
FOREVER = 10**5  # steps, more than any test waits for


def run(path, config=quick, **changes):
    """Train in this process; `changes` as in `flags`."""
    return train.run(config(RANDOM | dotted(changes)), str(path))


def at_steps(monkeypatch, actions):
    """Call actions[step]() when the metrics of that step are logged, before it is saved."""
    write = train.Log.write

    def write_and_act(self, step, metrics):
        values = write(self, step, metrics)
        actions.get(step, lambda: None)()
        return values

    monkeypatch.setattr(train.Log, 'write', write_and_act)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """A run of LONG steps, saved at the steps 4, 8, …, LONG."""
    path = tmp_path_factory.mktemp('unbroken')
    assert run(path, train__num_steps=LONG, train__checkpoint_every=4, train__keep_checkpoints=LONG) == 0
    assert saved(path) == list(range(4, LONG + 1, 4))
    return path


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
    """The same run, ended after two steps."""
    path = tmp_path_factory.mktemp('two')
    assert run(path, train__num_steps=2) == 0
    assert saved(path) == [2]
    return path


def test_the_logs_have_a_line_for_each_step(unbroken):
    rows = metrics(unbroken)
    assert [step for step, *_ in rows] == list(range(1, LONG + 1))
    np.testing.assert_allclose([rate for *_, rate in rows][:6], [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01], rtol=1e-6)
    losses = [loss for _, loss, *_ in rows]
    assert losses[0] == pytest.approx(1, abs=0.2)  # the last convolution starts at zero, and E ε² = 1
    assert np.mean(losses[-8:]) < 0.9 * losses[0]
    assert len(set(losses)) == LONG
    assert json.loads((unbroken / 'config.json').read_text())['model']['channels'] == 8


def test_metrics_are_logged_every_few_steps_and_at_the_end(unbroken, tmp_path):
    """And the steps are the same whether or not they are logged."""
    assert run(tmp_path, train__num_steps=8, train__log_every=3) == 0
    every = metrics(unbroken)
    assert metrics(tmp_path) == [every[step - 1] for step in (3, 6, 8)]
    assert_bitwise(checkpoint(tmp_path, 8), checkpoint(unbroken, 8))


@pytest.mark.parametrize(
    'config', [pytest.param(quick, id='two layers'), pytest.param(tiny, id='U-Net', marks=pytest.mark.slow)]
)
def test_two_steps_and_two_more_are_four(tmp_path, config, capsys):
    """Bit for bit."""
    whole, halves = tmp_path / 'whole', tmp_path / 'halves'
    assert run(whole, config, train__num_steps=4) == 0
    assert run(halves, config, train__num_steps=2) == 0
    assert saved(halves) == [2]
    capsys.readouterr()
    assert run(halves, config, train__num_steps=4) == 0
    printed = capsys.readouterr().out
    assert 'step 2 of 4' in printed and f'complete: 4 steps; checkpoints in {halves / "checkpoints"}' in printed
    assert saved(halves) == [2, 4]
    assert_bitwise(checkpoint(halves, 4), checkpoint(whole, 4))
    assert metrics(halves) == metrics(whole)


@pytest.mark.slow
def test_sheets_of_samples_are_drawn_on_the_way_and_change_no_step(unbroken, tmp_path):
    assert run(tmp_path, train__num_steps=4, train__sample_every=2) == 0
    assert_bitwise(checkpoint(tmp_path, 4), checkpoint(unbroken, 4))
    paths = sorted((tmp_path / 'samples' / 'progress').iterdir())
    assert [path.name for path in paths] == ['00000002.png', '00000004.png']
    for path in paths:
        with Image.open(path) as picture:
            assert np.ptp(np.asarray(picture)) > 100
            tiles = np.asarray(picture)[4:, 4:].reshape(8, 52, 8, 52).swapaxes(1, 2).reshape(train.PREVIEW_IMAGES, -1)
            assert len(np.unique(tiles, axis=0)) == train.PREVIEW_IMAGES


def test_the_first_sheets_come_early(tmp_path):
    """And are small."""
    preview = train.Preview(quick({'train.sample_every': 1000}), None, str(tmp_path), [0.0], None, 0)
    assert [step for step in range(1, 2001) if preview.due(step)] == [50, 100, 200, 500, 1000, 2000]
    assert run(tmp_path, train__num_steps=55, train__sample_every=55, train__log_every=55) == 0
    early, regular = sorted((tmp_path / 'samples' / 'progress').iterdir())
    assert [path.name for path in (early, regular)] == ['00000050.png', '00000055.png']
    with Image.open(early) as small, Image.open(regular) as large:
        assert small.width < large.width and small.height < large.height


def test_a_trained_run_can_be_sampled(unbroken):
    """By the command line, where each core is a device."""
    done = main(*flags(unbroken, QUICK, **RANDOM, sample__num_images=3, sample__num_steps=4), '--mode=sample')
    assert done.returncode == 0, done.stderr
    assert f'3 images from step {LONG}, ema weights' in done.stdout
    written = [line for line in done.stdout.splitlines() if line.startswith(str(unbroken / 'samples'))]
    assert [path.rpartition('/')[2] for path in written] == ['grid.png', 'samples.npz', 'record.json']
    with np.load(written[1]) as arrays:
        assert arrays['arr_0'].shape == (3, 8, 8, 1)
    with open(written[2], encoding='utf-8') as file:
        record = json.load(file)
    assert record['checkpoint_step'] == LONG
    (entry,) = record['metrics']
    assert f'{entry["name"]} (pixels, [-1,1]): {entry["value"]:.4f} ± {entry["standard_error"]:.4f}' in done.stdout
    if jax.default_backend() == 'cpu':
        assert record['device'] == f'{min(len(os.sched_getaffinity(0)), 3)} × cpu'  # at most one for each image


def test_a_complete_run_is_left_alone(two_steps, capsys):
    def files():
        folders = two_steps / 'checkpoints', two_steps / 'logs'
        return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob('*')}

    before = files()
    assert run(two_steps, train__num_steps=2) == 0
    printed = capsys.readouterr().out
    assert 'complete' in printed and '2 steps' in printed and str(two_steps / 'checkpoints') in printed
    assert files() == before


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('model.channels', 16),
        ('model.kind', 'v'),
        ('model.network', 'unet'),
        ('schedule.T', 5),
        ('schedule.name', 'cosine'),
        ('data.flip', False),
        ('model.dropout', 0.2),
    ],
)
def test_another_network_or_schedule_is_refused(two_steps, key, value):
    before = (two_steps / 'config.json').read_bytes()
    with pytest.raises(RunError) as error:
        train.run(quick(RANDOM | {key: value, 'train.num_steps': 4}), str(two_steps))
    assert f'config.{key}: ' in str(error.value) and f'{value!r} asked' in str(error.value)
    assert str(error.value).count('config.') == 1  # no other key differs
    assert (two_steps / 'config.json').read_bytes() == before and saved(two_steps) == [2]


def test_an_unwritable_place_for_checkpoints_is_refused_before_the_first_step(tmp_path):
    (tmp_path / 'checkpoints').write_text('not a folder')
    with pytest.raises(RunError, match=r'/checkpoints cannot be written .*--workdir'):
        run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {'checkpoints', '.lock'}


def test_steps_that_are_not_finite_change_nothing_and_end_the_run(two_steps, tmp_path):
    """The steps 3 to 6 have finite losses and gradients, but infinite updates."""
    path = tmp_path / 'run'
    shutil.copytree(two_steps, path)
    diverging = dict(train__learning_rate=1e30, train__warmup_steps=0, train__max_bad_steps=4)
    with pytest.raises(RunError) as error:
        run(path, train__num_steps=100, train__checkpoint_every=1, **diverging)
    for words in ('param_norm inf at step 6', 'the last 4 steps', 'the checkpoint of step 5 is good'):
        assert words in str(error.value)
    kept, before = checkpoint(path, 5), checkpoint(two_steps, 2)
    counts = {name: kept.pop(name) for name in list(kept) if name.startswith('skipped')}
    assert [int(count) for count in counts.values()] == [3, 3]
    assert_bitwise(kept, {name: array for name, array in before.items() if name not in counts})
    assert all(np.isfinite(array).all() for array in kept.values())
    lines = [json.loads(line) for line in (path / 'logs' / 'metrics.jsonl').read_text().splitlines()]
    assert [(line['step'], line['skipped']) for line in lines] == [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 4)]
    assert lines[-1]['param_norm'] is None and lines[-1]['loss'] > 0


def test_bad_steps_are_counted_across_a_resume(two_steps, tmp_path, capsys):
    """Two before it and two after it are four in a row."""
    path = tmp_path / 'run'
    shutil.copytree(two_steps, path)
    diverging = dict(train__learning_rate=1e30, train__warmup_steps=0, train__max_bad_steps=4)
    assert run(path, train__num_steps=4, **diverging) == 0
    assert '2 steps were skipped' in capsys.readouterr().out
    with pytest.raises(RunError, match='at step 6: the last 4 steps'):
        run(path, train__num_steps=100, **diverging)


# Runs that are stopped, and folders that change under them.


@contextlib.contextmanager
def started(command):
    """A run as a process, which ends with the block."""
    process = subprocess.Popen(
        [sys.executable, 'main.py', *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def await_step(path, step, process):
    """Wait until that step is logged."""
    log, deadline = path / 'logs' / 'metrics.jsonl', time.monotonic() + 300
    while process.poll() is None and not (log.exists() and metrics(path) and metrics(path)[-1][0] >= step):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_an_interrupted_run_resumes_as_if_it_had_not_been(unbroken, tmp_path, capsys):
    """In a process that compiles for itself; a sheet of samples at each step leaves time for the signal to arrive."""
    path = tmp_path / 'run'
    changes = RANDOM | {'compile_cache': tmp_path / 'compiled'}
    with started(flags(path, QUICK, **changes, train__num_steps=LONG, train__sample_every=1)) as process:
        await_step(path, 1, process)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_STATUS == 75, errors
    assert 'Traceback' not in errors
    (step,) = saved(path)  # nothing but the signal saved it
    assert 1 <= step < LONG
    assert f'SIGINT: stopped after step {step}, which is saved' in output
    assert metrics(path) == metrics(unbroken, last=step)
    assert list((tmp_path / 'compiled').iterdir()) and not (path / 'compiled').exists()

    assert run(path, train__num_steps=LONG) == 0
    assert f'step {step} of {LONG}' in capsys.readouterr().out
    assert_bitwise(checkpoint(path, LONG), checkpoint(unbroken, LONG))
    assert metrics(path) == metrics(unbroken)


@pytest.mark.slow
def test_training_goes_on_without_output(unbroken, tmp_path):
    """The disk of the log is full, and who read the errors is gone."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, 'main.py', *flags(tmp_path, QUICK, **RANDOM, train__num_steps=4)]
    with open('/dev/full', 'w', encoding='utf-8') as full, open(write_end, 'w', encoding='utf-8') as gone:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=gone, timeout=300)
    assert done.returncode == 0
    assert_bitwise(checkpoint(tmp_path, 4), checkpoint(unbroken, 4))


@pytest.mark.slow
@pytest.mark.parametrize('complete', [True, False], ids=['after a checkpoint', 'while one is written'])
def test_a_workdir_that_is_moved_during_the_run_is_created_again(unbroken, tmp_path, monkeypatch, capsys, complete):
    path, moved = tmp_path / 'run', tmp_path / 'moved'

    def move():
        while complete and 4 not in saved(path):
            time.sleep(0.01)
        path.rename(moved)

    at_steps(monkeypatch, {5: move, 10: terminate})
    assert run(path, train__num_steps=FOREVER, train__checkpoint_every=4) == EXIT_STATUS
    output, errors = capsys.readouterr()
    assert f'{path} was removed or moved during the run' in errors
    assert metrics(moved) == metrics(unbroken, last=5)
    step = saved(path)[-1]
    assert f'stopped after step {step}, which is saved' in output
    assert (path / 'config.json').read_bytes() == (moved / 'config.json').read_bytes()
    assert run(path, train__num_steps=step + 2) == 0
    assert f'step {step} of {step + 2}' in capsys.readouterr().out
    assert len(saved(path)) == len(list((path / 'checkpoints').iterdir()))  # nothing is left half done


def test_a_workdir_that_another_run_has_taken_is_left_to_it(tmp_path, monkeypatch):
    path = tmp_path / 'run'
    with contextlib.ExitStack() as stack:

        def take():
            path.rename(tmp_path / 'moved')
            stack.enter_context(FileLock(str(path / '.lock')))

        at_steps(monkeypatch, {3: take})
        with pytest.raises(RunError, match=rf'{path} was removed or moved .*{os.getpid()}'):
            run(path, train__num_steps=FOREVER)
    assert [file.name for file in path.iterdir()] == ['.lock']


def test_pictures_that_cannot_be_read_any_more_end_the_run_after_it_is_saved(tmp_path, monkeypatch):
    feed = train.feed

    def torn(*arguments, **how):
        yield from itertools.islice(feed(*arguments, **how), 3)
        raise ValueError('is the disk still there?')

    monkeypatch.setattr(train, 'feed', torn)
    with pytest.raises(RunError, match=r'batch of step 3 cannot be read: is the disk .*checkpoint of step 3 is good'):
        run(tmp_path / 'run', train__num_steps=FOREVER)
    assert saved(tmp_path / 'run') == [3]


def test_a_config_that_cannot_be_written_is_an_error_in_one_line(tmp_path):
    (tmp_path / 'run' / 'config.json.new').mkdir(parents=True)
    with pytest.raises(RunError, match=rf'{tmp_path / "run"} cannot be written'):
        run(tmp_path / 'run', train__num_steps=1)


def test_a_last_step_that_is_not_saved_is_an_error():
    """Also right after a step that was."""

    class Full:
        directory = 'checkpoints'

        def save(self, step, record, **trees):
            raise OSError('no room')

        def steps(self):
            return [4]

        def wait(self):
            pass

    unpacked = types.SimpleNamespace(unpacked=lambda state: types.SimpleNamespace(trees=dict))
    saver = train.Saver(quick(), unpacked, '', {}, Full(), None, None, 4)
    with pytest.raises(RunError, match=r'step 5 could not be saved in checkpoints; .* of step 4'):
        saver.finish(5, None)


def test_a_checkpoint_that_cannot_be_written_is_reported_and_repeated(unbroken, tmp_path, monkeypatch, capsys):
    """For a while, a file is where the folder of checkpoints should be."""
    path = tmp_path / 'run'
    in_the_way = path / 'checkpoints'

    def block():
        in_the_way.rename(tmp_path / 'before')
        in_the_way.write_text('not a folder')

    at_steps(monkeypatch, {1: block, 13: in_the_way.unlink, 16: terminate})
    assert run(path, train__num_steps=FOREVER, train__checkpoint_every=10) == EXIT_STATUS
    output, errors = capsys.readouterr()
    for step in (10, 11, 12):
        assert f'the checkpoint of step {step} could not be saved' in errors
    assert errors.count('it will be tried again') == 3
    assert saved(path) == [13, 16]
    assert 'stopped after step 16, which is saved' in output
    assert metrics(path) == metrics(unbroken)
