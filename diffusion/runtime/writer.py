"""Logs: metrics.jsonl, one object a line, and the same as TensorBoard events."""

import contextlib
import json
import math
import os
import sys
import time


@contextlib.contextmanager
def _hidden(name):
    """What asks for the module meanwhile is told that there is none."""
    there = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules[name] = None
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(there)


with _hidden('torch'):  # tensorboardX would import it where it is installed, for a second and 180 MB, and for nothing
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter  # writes at once; a SummaryWriter hangs on a full disk
    from tensorboardX.proto.event_pb2 import Event, SessionLog


class Writer:
    """Logs below one directory. What an earlier process logged beyond `step` is dropped: it is done again.

    A log that cannot be written is no reason to end a run: the first time, warn(message) is called.
    """

    def __init__(self, directory, *, step, warn=print):
        self._directory, self._warn, self._file, self._events = directory, warn, None, None
        with self._tolerant():
            os.makedirs(directory, exist_ok=True)
            path = os.path.join(directory, 'metrics.jsonl')
            _truncate(path, step)
            self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115 (closed in __exit__)
            self._events = EventsWriter(os.path.join(directory, 'events'), f'.{os.getpid()}')
            self._event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for log in (self._file, self._events):
            with self._tolerant():
                if log is not None:
                    log.close()

    def scalars(self, step, **values):
        """Log numbers at a step; what is not finite as null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._tolerant():
            if self._file:
                print(json.dumps({'step': step, **finite}), file=self._file, flush=True)
        with self._tolerant():
            for name, value in values.items():
                self._event(Event(step=step, summary=summary.scalar(name, value)))

    def image(self, step, name, image):
        """Log one picture, uint8 (H, W, C), to TensorBoard."""
        with self._tolerant():
            self._event(Event(step=step, summary=summary.image(name, image, dataformats='HWC')))

    def _event(self, event):
        if self._events:
            event.wall_time = time.time()
            self._events.write_event(event)
            self._events.flush()

    @contextlib.contextmanager
    def _tolerant(self):
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: a file that could not be opened, or was closed by an error
            if self._warn:
                self._warn(f'the logs in {self._directory} cannot be written: {error}; going on without')
                self._warn = None


def _truncate(path, step):
    """Keep the lines of metrics.jsonl up to `step`; a line cut off by a crash goes as well."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            try:
                if json.loads(line)['step'] <= step:
                    kept.append(line.rstrip('\n') + '\n')
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    with open(path + '.new', 'w', encoding='utf-8') as file:
        file.writelines(kept)
    os.replace(path + '.new', path)
