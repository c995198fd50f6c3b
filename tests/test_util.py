"""Helpers that several parts share: files and locks."""

import json
import subprocess
import sys

import pytest

from diffusion.util import FileLock, first_line, write_json


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


def test_the_first_line_of_an_error():
    assert first_line(ValueError('one\ntwo')) == 'one'
    assert first_line(ValueError()) == 'ValueError'
    assert first_line(ValueError('x' * 1000), most=10) == 'x' * 10


def test_a_lock_is_held_by_one_process_and_released_when_it_is_killed(tmp_path):
    lock = str(tmp_path / 'run' / '.lock')
    program = f"""
import sys, time
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
