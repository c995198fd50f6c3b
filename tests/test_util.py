"""Helpers that several parts share: files, locks and output."""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import subprocess
import sys
import time

import pytest

from diffusion import util
from diffusion.util import (
    FileLock,
    Output,
    exclusive,
    first_line,
    progress,
    replacing,
    stage,
    warn,
    write_json,
    write_text,
)


def test_json_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / 'new' / 'folder' / 'record.json'
    write_json(str(path), {'η': 0.5, 'steps': [1, 2]})
    assert json.loads(path.read_text(encoding='utf-8')) == {'η': 0.5, 'steps': [1, 2]}
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(str(path), {'count': 3, 'wrong': object()})
    assert path.read_bytes() == before
    write_json(str(path), {'count': 4})
    assert json.loads(path.read_text(encoding='utf-8')) == {'count': 4}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize('name', ['file', 'file.new'])
def test_a_link_is_replaced_and_not_followed(tmp_path, name):
    """As in a stranger's workdir, where it could name any file of the user."""
    precious = tmp_path / 'precious'
    precious.write_text('mine')
    (tmp_path / name).symlink_to(precious)
    write_text(str(tmp_path / 'file'), 'new')
    assert precious.read_text() == 'mine' and (tmp_path / 'file').read_text() == 'new'
    assert not (tmp_path / 'file').is_symlink()


def test_a_link_in_place_of_a_lock_file_is_refused(tmp_path):
    precious = tmp_path / 'precious'
    precious.write_text('mine')
    (tmp_path / '.lock').symlink_to(precious)
    with pytest.raises(OSError, match='symbolic link'), FileLock(str(tmp_path / '.lock')):
        pass
    with pytest.raises(OSError, match='symbolic link'), exclusive(str(tmp_path / '.lock'), 'waiting'):
        pass
    assert precious.read_text() == 'mine'


def test_the_first_line_of_an_error():
    assert first_line(ValueError('one\ntwo')) == 'one'
    assert first_line(ValueError()) == 'ValueError'
    assert first_line(ValueError('x' * 1000), most=10) == 'x' * 10


def test_a_lock_is_held_by_one_process_and_released_when_it_is_killed(tmp_path):
    lock = str(tmp_path / 'run' / '.lock')
    program = f"""
import sys, time
from diffusion import util
from diffusion.util import FileLock
with FileLock({lock!r}):
    print('held', flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == 'held\n'
        with pytest.raises(BlockingIOError, match=f'process {process.pid} on .* holds it'), FileLock(lock):
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with FileLock(lock), pytest.raises(BlockingIOError), FileLock(lock):
        pass


def test_a_lock_file_that_is_moved_is_lost_and_can_be_acquired_again(tmp_path):
    path = tmp_path / 'run' / '.lock'
    with FileLock(str(path)) as lock:
        assert not lock.lost()
        path.parent.rename(tmp_path / 'elsewhere')
        assert lock.lost()
        lock.acquire()
        assert not lock.lost()
        with pytest.raises(BlockingIOError), FileLock(str(path)):
            pass


@pytest.fixture
def pipe():
    """(a stream that writes into a pipe, the pipe's other end)."""
    read_end, write_end = os.pipe()
    with (
        open(read_end, 'rb') as reader,
        contextlib.suppress(BrokenPipeError),
        open(write_end, 'w', encoding='utf-8') as stream,
    ):
        yield stream, reader


def test_output_is_written_at_once(pipe):
    stream, reader = pipe
    Output(stream).write('step 1\n')
    assert reader.readline() == b'step 1\n'


def test_output_that_nobody_reads_is_dropped(pipe):
    """The reader is gone, or has stopped reading: then nothing waits for it."""
    stream, reader = pipe
    for _ in range(100):
        Output(stream).write(9999 * 'x' + '\n')
    reader.close()
    Output(stream).write('nobody\n')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='it is a device of Linux')
def test_output_on_a_full_disk_is_dropped():
    with contextlib.suppress(OSError), open('/dev/full', 'w', encoding='utf-8') as stream:
        for _ in range(100):
            Output(stream).write(999 * 'x' + '\n')


def test_output_without_a_stream_is_dropped():
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        Output(stream).write('nothing\n')


def test_characters_that_the_output_lacks_are_replaced():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding='latin-1')
    Output(stream).write('2 × cpu … √ᾱ\n')
    assert raw.getvalue().decode('latin-1').startswith('2 × cpu ? ?')


def test_bars_and_warnings_survive_an_output_that_is_gone(pipe, monkeypatch):
    stream, reader = pipe
    monkeypatch.setattr(sys, 'stderr', stream)
    with progress(total=3, doing='train', unit='step') as bar:
        bar.update()
        warn('first')
        assert b'warning: first\n' in reader.read1()
        reader.close()
        bar.update()
        bar.refresh()
        warn('second')
    monkeypatch.setattr(sys, 'stderr', None)
    with progress(total=3, doing='train', unit='step') as bar:
        bar.update()
    warn('third')


def test_a_bar_in_a_file_is_drawn_at_its_begin_and_its_end(monkeypatch):
    """And every ten seconds between, so that the log of a cluster's job stays short."""
    log = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', log)
    with progress(total=1000, doing='train', unit='step') as bar:
        for _ in range(1000):
            bar.update()
    drawn = [line for line in re.split('[\\r\\n]', log.getvalue()) if line]
    assert 1 <= len(drawn) <= 2
    assert '1000/1000' in drawn[-1]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    (tmp_path / 'a').write_text('old')
    with pytest.raises(OSError, match='full'), replacing(str(tmp_path / 'a')) as file:
        file.write(b'new')
        raise OSError('full')
    assert [path.name for path in tmp_path.iterdir()] == ['a'] and (tmp_path / 'a').read_text() == 'old'


def test_a_lock_whose_folder_became_a_file_is_lost(tmp_path):
    with FileLock(str(tmp_path / 'run' / '.lock')) as lock:
        (tmp_path / 'run').rename(tmp_path / 'moved')
        (tmp_path / 'run').touch()
        assert lock.lost()


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys, number):
    """As some NFS and Lustre mounts are."""

    def no_lock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, 'flock', no_lock)
    with FileLock(str(tmp_path / 'run' / '.lock')) as lock:  # lockf is enough
        assert not lock.lost()
    assert capsys.readouterr().err == ''
    monkeypatch.setattr(fcntl, 'lockf', no_lock)
    with FileLock(str(tmp_path / 'run' / '.lock')) as lock:
        assert not lock.lost()
        (tmp_path / 'run' / '.lock').unlink()
        assert lock.lost()
    assert f'the file system of {tmp_path / "run"} has no locks' in capsys.readouterr().err
    with pytest.raises(OSError, match='no locks'), exclusive(str(tmp_path / 'cache.lock'), 'waiting'):
        pass


def test_a_long_stage_says_that_it_is_still_going(monkeypatch, capsys):
    """Ever more rarely, and not once it is over."""
    monkeypatch.setattr(util, 'REMINDER', 0.05)
    with stage('compiling it'):
        time.sleep(0.25)
    time.sleep(0.2)
    first, *others = capsys.readouterr().out.splitlines()
    assert first == 'compiling it …'
    assert 1 <= len(others) <= 2 and all(line.startswith('… still compiling it, for ') for line in others)


def test_a_bar_in_a_file_goes_on_when_the_work_slows_down(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', log)
    monkeypatch.setattr(util, 'LOG_EVERY', 0.02)
    with progress(total=10_000, doing='train', unit='step') as bar:
        for _ in range(9_990):  # fast
            bar.update()
        before = log.getvalue().count('\r')
        for _ in range(5):
            time.sleep(0.03)
            bar.update()
        assert log.getvalue().count('\r') >= before + 4
