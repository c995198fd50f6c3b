"""Ctrl-C and SIGTERM: the first one asks the run to end at the next step, a second one ends it at once."""

import contextlib
import os
import select
import signal
import threading
import time

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not done, the same command goes on
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 2  # seconds


class Interrupt:
    """Context manager; true once a signal has come, which is told at once. unit: what ends first, and is saved."""

    def __init__(self, unit='step'):
        self._unit = unit

    def __enter__(self):
        self._name = None
        # Python calls `_catch` only between two of its own operations, and compiling is one that may take minutes. To
        # a pipe the numbers of signals come at once, and a thread reads them.
        self._numbers, self._end = os.pipe()
        os.set_blocking(self._end, False)
        self._teller = threading.Thread(target=self._tell, daemon=True)
        self._teller.start()
        self._previous = {number: signal.signal(number, self._catch) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._end, warn_on_full_buffer=False)
        return self

    def __exit__(self, kind, *exception):
        self._restore()
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._end)
        self._teller.join()
        os.close(self._numbers)
        if self and kind is KeyboardInterrupt:
            raise KeyboardInterrupt('at once; the same command goes on from what is saved')

    def __bool__(self):
        return self._name is not None

    def __str__(self):
        return str(self._name)

    def _catch(self, number, frame):
        self._name = signal.Signals(number).name
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _tell(self):
        first = None
        while number := os.read(self._numbers, 1):
            if number[0] not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                with contextlib.suppress(OSError):  # nobody listens
                    os.write(2, self._news(number[0]).encode())
            elif self or time.monotonic() > first + 1:  # else one signal came twice, as `timeout` sends it
                soon, _, _ = select.select([self._numbers], [], [], PATIENCE)
                if not soon or os.read(self._numbers, 1):  # Python has not had its turn, which closes the pipe
                    os._exit(128 + number[0])
                return

    def _news(self, number):
        name = signal.Signals(number).name
        return f'\n{name}: the {self._unit} ends, is saved, and the run ends; once more ends it at once\n'
