"""Signals: the first one asks a run to stop, the second one stops it at once."""

import signal
import subprocess
import sys
import time

import pytest

from diffusion.runtime.interrupt import EXIT_STATUS, Interrupt
from tests.runtime.common import ROOT, python


def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


def test_the_second_ctrl_c_stops_at_once():
    before = handlers()
    with Interrupt() as interrupt:
        assert not interrupt
        signal.raise_signal(signal.SIGINT)
        assert interrupt and str(interrupt) == 'SIGINT'
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupt
    assert handlers() == before


def test_handlers_are_restored_without_a_signal():
    before = handlers()
    with Interrupt() as interrupt:
        assert signal.getsignal(signal.SIGTERM) not in before
    assert not interrupt
    assert handlers() == before


def test_the_second_sigterm_stops_at_once():
    done = python(
        'import signal\n'
        'from diffusion.runtime.interrupt import Interrupt\n'
        'with Interrupt() as interrupt:\n'
        '    signal.raise_signal(signal.SIGTERM)\n'
        '    print(interrupt, bool(interrupt), flush=True)\n'
        '    signal.raise_signal(signal.SIGTERM)\n'
        "    print('still here', flush=True)\n"
    )
    assert done.stdout.split() == ['SIGTERM', 'True'], done.stderr
    assert done.returncode == -signal.SIGTERM
    assert EXIT_STATUS == 75


def test_a_signal_is_announced_while_python_is_inside_one_call():
    """As while XLA compiles. A second signal ends the process, but two copies of one signal do not."""
    program = (
        'import hashlib, sys\n'
        'from diffusion.runtime import interrupt\n'
        'assert "jax" not in sys.modules\n'  # main.py catches signals before it imports anything heavy
        'interrupt.PATIENCE = interrupt.DUPLICATE = 0.4\n'
        'with interrupt.Interrupt("part"):\n'
        '    print("begins", flush=True)\n'
        '    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)\n'
    )
    pipes = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, '-c', program], **pipes) as process:
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
            assert process.wait(timeout=20) == 128 + signal.SIGINT
        finally:
            process.kill()
