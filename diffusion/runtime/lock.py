"""One training at a time on one workdir."""

import contextlib
import fcntl
import os
import socket


@contextlib.contextmanager
def lock(workdir):
    """Hold `workdir`, made if it does not exist, until the process ends, in whatever way it ends.

    Raises OSError where the workdir cannot be written to, and BlockingIOError, which tells the host and the process,
    where another process holds it.
    """
    os.makedirs(workdir, exist_ok=True)
    with open(os.path.join(workdir, '.lock'), 'a+', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BlockingIOError(f'{file.read().strip()} is training in it') from error
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield
