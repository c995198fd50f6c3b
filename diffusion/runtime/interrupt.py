"""Ctrl-C and SIGTERM: the first signal asks a run to stop after its current step, a second one stops it at once."""

import contextlib
import os
import select
import signal
import threading
import time
from types import FrameType

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not complete, and the same command continues the run
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 2  # seconds that Python has to handle a second signal before the process is ended for it
DUPLICATE = 1  # seconds within which a second signal may be a copy of the first, as `timeout` sends it twice


class Interrupt:
    """Context manager that is true once a signal has arrived; its string is then the signal's name.

    The first signal is announced on stderr at once, even while Python is inside a long call such as a compilation.
    """

    def __init__(self, unit: str = 'step'):
        """Create the context manager.

        Args:
            unit: what is finished and saved before the run stops, for the announcement.
        """
        self._unit = unit
        self._name: str | None = None

    def __enter__(self) -> 'Interrupt':
        self._name = None
        # Python runs `_handle` only between two of its own instructions, but a compilation is a single one that may
        # take minutes. The wakeup pipe receives the signal's number immediately, and a thread reads it.
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._reporter = threading.Thread(target=self._report, daemon=True)
        self._reporter.start()
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._previous_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._restore_handlers()
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._write_end)
        self._reporter.join()
        os.close(self._read_end)
        if self and kind is KeyboardInterrupt:
            raise KeyboardInterrupt('stopped at once; the same command continues from what is saved')

    def __bool__(self) -> bool:
        return self._name is not None

    def __str__(self) -> str:
        return str(self._name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._name = signal.Signals(number).name
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _report(self) -> None:
        """Announce the first signal, and end the process after a second one that Python does not handle in time."""
        first = None
        while number := os.read(self._read_end, 1):
            if number[0] not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                with contextlib.suppress(OSError):  # stderr may be closed
                    os.write(2, self._announcement(number[0]).encode())
            elif self or time.monotonic() > first + DUPLICATE:
                handled, _, _ = select.select([self._read_end], [], [], PATIENCE)  # __exit__ closes the pipe
                if not handled or os.read(self._read_end, 1):
                    os._exit(128 + number[0])
                return

    def _announcement(self, number: int) -> str:
        name = signal.Signals(number).name
        return f'\n{name}: stopping after this {self._unit} is saved; a second signal stops at once\n'
