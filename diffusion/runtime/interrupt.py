"""Ctrl-C and SIGTERM: the first one asks the run to end at the next step, a second one ends it at once."""

import signal

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not done, the same command goes on


class Interrupt:
    """Context manager; true once a signal has come."""

    def __enter__(self):
        self._name = None
        self._previous = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self):
        return self._name is not None

    def __str__(self):
        return str(self._name)

    def _catch(self, number, frame):
        self._name = signal.Signals(number).name
        self.__exit__()
