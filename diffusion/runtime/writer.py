"""Logs: metrics.jsonl, one object a line, and the same as TensorBoard events."""

import json
import os

from tensorboardX import SummaryWriter


class Writer:
    """Logs below one directory. What an earlier process logged beyond `step` is dropped: it is done again."""

    def __init__(self, directory, *, step):
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, 'metrics.jsonl')
        _truncate(path, step)
        self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115 (closed in __exit__)
        self._events = SummaryWriter(directory, purge_step=step + 1)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()
        self._events.close()

    def scalars(self, step, **values):
        """Log numbers at a step."""
        print(json.dumps({'step': step, **values}), file=self._file, flush=True)
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def image(self, step, name, image):
        """Log one picture, uint8 (H, W, C), to TensorBoard."""
        self._events.add_image(name, image, step, dataformats='HWC')


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
