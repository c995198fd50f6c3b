"""Signals: the first one ends a process, or asks it to stop once it has saved; the second one ends it at once."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from diffusion.runtime.interrupt import EXIT_STATUS, SIGNALS, Interrupt, finishing, until
from tests.runtime.common import ROOT, python


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def test_in_a_process_of_others_the_first_signal_is_a_request_and_the_second_is_theirs():
    before = handlers()
    with Interrupt() as interrupt:
        assert not interrupt
        signal.raise_signal(signal.SIGINT)
        assert interrupt and str(interrupt) == 'SIGINT'
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupt
    assert interrupt and str(interrupt) == 'SIGINT'
    assert handlers() == before


def test_handlers_are_restored_without_a_signal():
    before = handlers()
    with Interrupt() as interrupt:
        assert not set(handlers()) & set(before)
    assert not interrupt
    assert handlers() == before


def test_what_is_being_finished_is_complete_before_a_signal_ends_the_work():
    done = []
    with pytest.raises(KeyboardInterrupt), finishing('file'):
        with finishing('part of it'):
            signal.raise_signal(signal.SIGTERM)
            done.append('the inner one')
        done.append('the outer one')
    assert done == ['the inner one', 'the outer one']
    with Interrupt() as interrupt, finishing('file'):  # which leaves the request to the Interrupt
        signal.raise_signal(signal.SIGTERM)
    assert interrupt
    with finishing('files'), Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
    assert interrupt


def listening(program):
    """A process that listens, and prints a line when it is ready. Programs wait in one call that takes minutes."""
    program = (
        'import hashlib, sys, time\n'
        'from diffusion.runtime import interrupt\n'
        'interrupt.listen()\n'
        'assert not {"jax", "numpy", "absl"} & set(sys.modules)\n'  # before anything heavy is imported
        'def block():\n'
        '    print("begins", flush=True)\n'
        '    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)\n'
        f'{program}'
    )
    pipes = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, '-c', program], **pipes)


@pytest.mark.parametrize('number', SIGNALS)
def test_a_signal_ends_a_process_inside_one_call(number):
    """As while XLA compiles: with one line, and nothing is unwound."""
    with listening('try:\n    block()\nfinally:\n    print("unwound", flush=True)\n') as process:
        try:
            assert process.stdout.readline() == 'begins\n'
            process.send_signal(number)
            output, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == EXIT_STATUS == 75
    assert output == '' and errors.split('\n', 1)[1] == (
        'interrupted: nothing is written yet; the same command starts over\n'
    )


def test_a_signal_is_not_lost_where_python_swallows_exceptions():
    """In callbacks of garbage collection, as JAX has one, and in __del__."""
    program = (
        'import gc\n'
        'gc.callbacks.append(lambda *_: time.sleep(0.05))\n'
        'class Slow:\n'
        '    def __del__(self):\n'
        '        time.sleep(0.05)\n'
        'print("begins", flush=True)\n'
        'while True:\n'
        '    gc.collect()\n'
        '    Slow()\n'
    )
    with listening(program) as process:
        try:
            assert process.stdout.readline() == 'begins\n'
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == EXIT_STATUS
            assert 'Exception ignored' not in process.stderr.read()
        finally:
            process.kill()


def test_a_request_is_announced_at_once_and_a_second_signal_ends_the_process():
    """But two copies of one signal do not."""
    with listening('with interrupt.Interrupt("part"):\n    block()\n') as process:
        try:
            assert process.stdout.readline() == 'begins\n'
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            assert process.stderr.readline() == '\n'
            assert process.stderr.readline() == (
                'SIGTERM: stopping after this part is saved; a second signal stops at once\n'
            )
            time.sleep(0.6)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == EXIT_STATUS
            assert 'interrupted: stopped at once' in process.stderr.read()
        finally:
            process.kill()


def test_a_copy_of_a_signal_may_come_a_little_later():
    with listening('interrupt.DUPLICATE = 60\nwith interrupt.Interrupt("part"):\n    block()\n') as process:
        try:
            assert process.stdout.readline() == 'begins\n'
            process.send_signal(signal.SIGTERM)
            assert process.stderr.readline() == '\n' and process.stderr.readline().startswith('SIGTERM: stopping')
            process.send_signal(signal.SIGTERM)
            time.sleep(0.6)
            assert process.poll() is None
        finally:
            process.kill()


def test_after_a_request_the_process_ends_only_when_it_wants():
    done = python(
        'import os, signal, time\n'
        'from diffusion.runtime import interrupt\n'
        'interrupt.listen()\n'
        'with interrupt.Interrupt() as request:\n'
        '    os.kill(os.getpid(), signal.SIGHUP)\n'
        '    while not request:\n'
        '        time.sleep(0.01)\n'
        'print(request)\n'
    )
    assert (done.returncode, done.stdout) == (0, 'SIGHUP\n'), done.stderr


def test_a_request_may_be_served_before_the_thread_that_reads_signals_runs():
    done = python(
        'import os, signal, sys, time\n'
        'from diffusion.runtime import interrupt\n'
        'interrupt.listen()\n'
        'sys.setswitchinterval(100)\n'
        'with interrupt.Interrupt() as request:\n'
        '    os.kill(os.getpid(), signal.SIGTERM)\n'
        'time.sleep(0.5)\n'
        'print(request)\n'
    )
    assert (done.returncode, done.stdout) == (0, 'SIGTERM\n'), done.stderr


def test_a_process_under_nohup_survives_its_terminal():
    done = python(
        'import os, signal\n'
        'signal.signal(signal.SIGHUP, signal.SIG_IGN)\n'
        'from diffusion.runtime import interrupt\n'
        'interrupt.listen()\n'
        'os.kill(os.getpid(), signal.SIGHUP)\n'
        'print("alive")\n'
    )
    assert (done.returncode, done.stdout) == (0, 'alive\n'), done.stderr


def test_unfinished_folders_are_removed_when_the_process_is_ended(tmp_path):
    program = (
        'import os\n'
        'from diffusion.util import unfinished\n'
        f'with unfinished({str(tmp_path / "new")!r}):\n'
        f'    os.makedirs({str(tmp_path / "new" / "inner")!r})\n'
        '    block()\n'
    )
    with listening(program) as process:
        try:
            assert process.stdout.readline() == 'begins\n'
            assert list(tmp_path.iterdir())
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == EXIT_STATUS
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []


def test_items_that_do_not_come_are_not_waited_for():
    """As batches from a file system that hangs; those that come are all there, in order, and so is an error."""
    hang, stop = threading.Event(), []

    def items():
        yield from range(3)
        stop.append('now')
        hang.wait(30)

    assert list(until(lambda: bool(stop), items())) == [0, 1, 2]
    hang.set()
    assert list(until(lambda: True, iter(range(5)))) == [0, 1, 2, 3, 4]

    def failing():
        yield 0
        raise OSError('no such file')

    with pytest.raises(OSError, match='no such file'):
        list(until(lambda: False, failing()))
