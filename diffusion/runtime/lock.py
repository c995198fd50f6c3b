"""One training at a time on one workdir."""

import fcntl
import os
import socket


class Lock:
    """Context manager: holds `workdir`, made if it does not exist, until the process ends, in whatever way it ends.

    Raises OSError where the workdir cannot be written to, and BlockingIOError, which tells the host and the process,
    where another process holds it.
    """

    def __init__(self, workdir):
        self._path, self._file = os.path.join(workdir, '.lock'), None

    def __enter__(self):
        self.take()
        return self

    def __exit__(self, *exception):
        self._file.close()

    def take(self):
        """Hold the workdir, also once more where it was `lost`."""
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        file = open(self._path, 'a+', encoding='utf-8')  # noqa: SIM115 (held open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                raise BlockingIOError(f'{file.read().strip()} is training in it') from error
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        if self._file:
            self._file.close()
        self._file = file

    def lost(self):
        """Whether the workdir is no longer the one that is held: it was removed or moved."""
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return True
