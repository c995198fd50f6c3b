"""Signals that stop a process: it ends at once or, if it is saving something, after that is complete.

A signal never raises an exception, because the exception would be raised in whatever code runs at the moment: some
callbacks swallow it, such as those of garbage collection, and XLA's compiler crashes when it is unwound. The Python
handlers only set a flag. A thread reads the signals from a pipe, even while the main thread is inside one long call,
and ends the process if nothing is being saved.
"""

import contextlib
import os
import queue
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from diffusion.util import UNFINISHED

Item = TypeVar('Item')
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not complete, and the same command continues the run
# From Ctrl-C, from schedulers, from a closed terminal, and from SLURM and submitit before the time limit.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
DUPLICATE = 0.3  # seconds within which a second signal is a copy of the first, as `timeout` sends it twice


class _Listener:
    """Reads the signals of this process while it is started."""

    def __init__(self, *, owns_process: bool):
        """Create the listener.

        Args:
            owns_process: signals may end the process. If False, only the first one is read, as a request, and the
                earlier handlers are restored for the second.
        """
        self._owns_process = owns_process
        self._lock = threading.Lock()  # a signal either is a request or ends the process; none is lost in between
        self._contexts: list[Interrupt] = []  # within which a signal is a request; the outermost first
        self.name = ''  # name of the first signal that was a request
        self._since = 0.0  # when it arrived
        self.answered = False  # whether an Interrupt has ended since then whose owner checks it for requests

    def start(self) -> None:
        """Install the handlers. Call it in the main thread; elsewhere it does nothing, as Python allows no more."""
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        # Python calls a handler only between two of its own instructions, but writes the signal's number into the
        # wakeup pipe immediately.
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self._previous_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self.install()

    def install(self) -> None:
        """Install the handlers, also once more after a library has replaced them."""
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            previous = signal.signal(number, self._handle)
            self._previous.setdefault(number, previous)

    def stop(self) -> None:
        """Restore the earlier handlers."""
        if self._previous:
            self._restore_handlers()
            signal.set_wakeup_fd(self._previous_wakeup)
            os.close(self._write_end)
            self._thread.join()
            os.close(self._read_end)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def enter(self, context: 'Interrupt') -> None:
        """Make the first signal a request from now on."""
        with self._lock:
            self._contexts.append(context)

    def leave(self) -> bool:
        """End the context that `enter` began; return whether it was the outermost one."""
        with self._lock:
            self._contexts.pop()
            return not self._contexts

    def _unit(self) -> str:
        """The unit that is finished before the process stops: of the innermost context that checks for requests."""
        asking = [context for context in self._contexts if context.asks]
        return (asking or self._contexts)[-1].unit

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # The thread does the work, but may run only after the name is read for the next time.
        if self._contexts and not self.name:
            self.name = signal.Signals(number).name
        if not self._owns_process:
            self._restore_handlers()
            if not self.name:  # it arrived after the last context ended
                signal.raise_signal(number)

    def _read(self) -> None:
        """Announce the first signal, or end the process."""
        while number := os.read(self._read_end, 1):
            if number[0] not in SIGNALS:
                continue
            with self._lock:
                # The handler may have made it a request, and its context may have ended, before this thread ran.
                if (self._contexts or self.name) and not self._since:
                    self._since = time.monotonic()
                    self.name = name = signal.Signals(number[0]).name
                    second = '; a second signal stops at once' if self._owns_process else ''
                    if self._contexts:
                        _print(f'\n{name}: stopping after this {self._unit()} is saved{second}\n')
                elif not self._owns_process:
                    return
                elif not self._since:
                    end()
                elif time.monotonic() > self._since + DUPLICATE:
                    end('stopped at once; the same command continues from what is saved')


_listener: _Listener | None = None  # started by `listen`, or else by the outermost `Interrupt`
_left = ['nothing is written yet; the same command starts over']
_ending = threading.Event()


def listen() -> None:
    """End the process with EXIT_STATUS at the first signal from now on; within an `Interrupt`, at the second.

    A program calls it first, and calls it again after a library has installed its own handlers.
    """
    global _listener
    if _listener is None:
        _listener = _Listener(owns_process=True)
        _listener.start()
    else:
        _listener.install()


def leaves(text: str) -> None:
    """Set the text for the last line of an interrupted command: what it leaves on disk, and how to continue."""
    _left[:] = [text]


def end(text: str = '') -> None:
    """End the process with EXIT_STATUS from any thread, without unwinding the stack.

    Args:
        text: the last line; by default the text that `leaves` set.
    """
    _ending.set()
    for path in list(UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)
    _print(f'\ninterrupted: {text or _left[0]}\n')
    os._exit(EXIT_STATUS)


def wait_for_end() -> None:
    """If another thread is ending the process, wait until it has: what fails meanwhile lacks the files it removes."""
    while _ending.is_set():
        time.sleep(1)


class Interrupt:
    """Context manager within which the first signal is a request to stop, which is announced on stderr at once.

    It is true once there is a request; its string is then the signal's name. A second signal ends a program that called
    `listen`; in other processes the earlier handlers get it.
    """

    def __init__(self, unit: str = 'step', *, asks: bool = True):
        """Create the context manager.

        Args:
            unit: what is finished and saved before the process stops, for the announcement.
            asks: whether its owner checks it for requests, and stops at one.
        """
        self.unit, self.asks = unit, asks
        self._name = ''
        self._listener: _Listener | None = None
        self.unanswered = False  # set at the end: there is a request that no owner of an Interrupt has seen

    def __enter__(self) -> 'Interrupt':
        global _listener
        self._own = _Listener(owns_process=False) if _listener is None else None
        if self._own:
            _listener = self._own
            self._own.start()
        assert _listener
        _listener.enter(self)
        self._listener = _listener
        return self

    def __exit__(self, *exception: object) -> None:
        global _listener
        assert self._listener
        outermost = self._listener.leave()
        self._name = self._listener.name
        self._listener.answered |= self.asks and bool(self._name)
        self.unanswered = bool(self._name) and outermost and not self._listener.answered
        if self._own:
            self._own.stop()
            _listener = None

    def __bool__(self) -> bool:
        return bool(str(self))

    def __str__(self) -> str:
        return self._name or (self._listener.name if self._listener else '')


@contextlib.contextmanager
def finishing(unit: str) -> Iterator[None]:
    """Complete the context before a signal ends the process.

    Args:
        unit: as in `Interrupt`.

    Raises:
        KeyboardInterrupt: at the end of the context, if a signal arrived; not within an `Interrupt`, whose owner sees
            the request.
    """
    with Interrupt(unit, asks=False) as interrupt:
        yield
    if interrupt.unanswered:
        raise KeyboardInterrupt


def until(stop: Callable[[], bool], items: Iterator[Item]) -> Iterator[Item]:
    """Yield items that may take long, such as those from a file system that hangs; end early if `stop()` is true.

    Args:
        stop: called every half second while there is no item.
        items: iterated in another thread, at most two items ahead.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(1)
    over = threading.Event()

    def put(what: str, value: Any) -> None:
        while not over.is_set():
            try:
                ready.put((what, value), timeout=0.5)
                break
            except queue.Full:
                continue

    def take() -> None:
        try:
            for item in items:
                put('item', item)
                if over.is_set():
                    return
            put('end', None)
        except BaseException as error:
            put('error', error)

    threading.Thread(target=take, daemon=True).start()
    try:
        while True:
            try:
                what, value = ready.get(timeout=0.5)
            except queue.Empty:
                if stop():
                    return
                continue
            if what == 'error':
                raise value
            if what == 'end':
                return
            yield value
    finally:
        over.set()


def _print(text: str) -> None:
    """Write to stderr, unless it is closed or blocked."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 1)[1]:
            os.write(2, text.encode())
