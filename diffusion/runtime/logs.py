"""Logs: metrics.jsonl with one object per line, and the same numbers as TensorBoard events."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter  # writes at once; a SummaryWriter hangs on a full disk
from tensorboardX.proto.event_pb2 import Event, SessionLog

from diffusion.util import no_link, open_regular, parse_json, write_text


class Writer:
    """Context manager that writes the logs of a run below one folder.

    A log that cannot be written does not stop a run: the first failure is reported by `warn`, later ones are silent.
    """

    def __init__(self, directory: str, *, step: int, warn: Callable[[str], object] = print):
        """Open the logs, and drop what an earlier process logged beyond `step`, because these steps will be repeated.

        Args:
            directory: the folder; it is created if it does not exist.
            step: the step from which the run continues.
            warn: called with a message at the first failure.
        """
        self._directory = directory
        self._warn: Callable[[str], object] | None = warn
        self._file: TextIO | None = None
        self._events: EventsWriter | None = None
        with self._tolerant():
            os.makedirs(directory, exist_ok=True)
            path = os.path.join(directory, 'metrics.jsonl')
            _truncate(path, step)
            self._file = open(path, 'a', encoding='utf-8', opener=no_link)  # noqa: SIM115 (closed in __exit__)
            self._events = EventsWriter(os.path.join(directory, 'events'), f'.{os.getpid()}')
            # TensorBoard ignores the events of earlier files from this step on.
            self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self) -> 'Writer':
        return self

    def __exit__(self, *exception: object) -> None:
        for log in (self._file, self._events):
            with self._tolerant():
                if log is not None:
                    log.close()

    def scalars(self, step: int, **values: float) -> None:
        """Log numbers at a step; metrics.jsonl has null for numbers that are not finite."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._tolerant():
            if self._file:
                print(json.dumps({'step': step, **finite}), file=self._file, flush=True)
        with self._tolerant():
            for name, value in values.items():
                self._write(Event(step=step, summary=summary.scalar(name, value)))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log one picture, uint8 (H, W, C), to TensorBoard."""
        with self._tolerant():
            self._write(Event(step=step, summary=summary.image(name, image, dataformats='HWC')))

    def _write(self, event: Event) -> None:
        if self._events:
            event.wall_time = time.time()
            self._events.write_event(event)
            self._events.flush()

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: writing to a file that an earlier error closed
            if self._warn:
                self._warn(f'the logs in {self._directory} cannot be written: {error}; continuing without them')
                self._warn = None


def _truncate(path: str, step: int) -> None:
    """Keep the lines of metrics.jsonl up to `step`; a line that a crash cut short is dropped as well."""
    if not os.path.exists(path):
        return
    write_text(path, ''.join(line for logged, line in _lines(path) if logged <= step))


def last_step(directory: str) -> int:
    """Return the last step that the logs in a folder have; 0 if they have none, or cannot be read."""
    with contextlib.suppress(OSError):
        return max((step for step, _ in _lines(os.path.join(directory, 'metrics.jsonl'))), default=0)
    return 0


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield (step, line) of each complete line of metrics.jsonl."""
    with open_regular(path, 'rb') as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):  # the last one: a step of 1e999
                yield int(parse_json(line)['step']), line.decode().rstrip('\n') + '\n'
