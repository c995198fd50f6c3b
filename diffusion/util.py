"""Helpers that several parts of the project share: files, locks, errors, output.

It imports nothing heavy, so that the command line can print before JAX is imported.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import platform
import select
import shutil
import socket
import stat
import sys
import threading
import time
import tokenize
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

PATIENCE = 5  # seconds that output waits for a pipe or a terminal that accepts none
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems
REMINDER = 15.0  # seconds after which a stage reports that it goes on; the interval doubles each time
LOG_EVERY = 10.0  # seconds between two lines of a progress bar in a file
PIECE = 1024  # characters of at most 4 bytes each; a pipe that accepts anything accepts as many without blocking
UNFINISHED: set[str] = set()  # folders that are removed if the process is ended, see `unfinished`

# Settings of JAX, and variables with flags of compilers, that change numbers; and flags that do not.
JAX_SETTINGS = (
    'jax_default_matmul_precision',
    'jax_disable_jit',
    'jax_enable_x64',
    'jax_numpy_dtype_promotion',
    'jax_random_seed_offset',
    'jax_threefry_partitionable',
)
COMPILER_FLAGS = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'NVIDIA_TF32_OVERRIDE')
HARMLESS_FLAGS = ('--xla_dump', '--xla_force_host_platform_device_count')


def first_line(error: BaseException | None, most: int = 300) -> str:
    """Return the first line of an exception's message, at most `most` characters; its type if it has no message."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:most]


@dataclasses.dataclass(frozen=True)
class Output:
    """A text stream that never fails, because a failure of output must not stop a run.

    Text is dropped if the disk is full, the reader of the pipe has ended or has stopped reading, the terminal is
    closed, or the process was started without the stream (then it is None). Characters that the stream's encoding lacks
    become '?'.
    """

    stream: TextIO | None
    patience: float = 0  # seconds to wait for a reader

    def write(self, text: str) -> None:
        """Write text, and flush it."""
        stream = self.stream
        if stream is None:
            return
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            for start in range(0, len(text), PIECE):
                with contextlib.suppress(io.UnsupportedOperation):  # a stream that is no file takes everything
                    if not select.select([], [stream], [], self.patience)[1]:
                        return
                piece = text[start : start + PIECE]
                try:
                    stream.write(piece)
                except UnicodeEncodeError:
                    stream.write(piece.encode(stream.encoding, 'replace').decode(stream.encoding))
                stream.flush()

    def flush(self) -> None:
        """Do nothing: `write` flushes."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the stream, for tqdm: whether it is a terminal, and its encoding."""
        return getattr(self.stream, name)


def say(message: str = '') -> None:
    """Print a line, on the first host only."""
    import jax

    if jax.process_index() == 0:
        say_here(message)


def say_here(message: str) -> None:
    """Print a line, on every host; it may be called before the hosts have met."""
    Output(sys.stdout, PATIENCE).write(f'{message}\n')


def warn(message: str) -> None:
    """Print a warning to stderr, above the progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f'warning: {message}', file=Output(sys.stderr))


def progress(*, total: int, doing: str, unit: str, initial: int = 0, hidden: bool = False) -> 'tqdm':
    """Return a progress bar on stderr; where that is no terminal, the bar is drawn every LOG_EVERY seconds.

    Args:
        total: the number of units.
        doing: the word before the bar, such as 'train'.
        unit: the name of a unit.
        initial: the number of units that are done already.
        hidden: whether to show nothing.
    """
    from tqdm import tqdm

    interval = {} if _is_terminal(sys.stderr) else dict(mininterval=LOG_EVERY, miniters=1)
    return tqdm(
        total=total,
        desc=doing,
        unit=unit,
        initial=initial,
        file=Output(sys.stderr),
        dynamic_ncols=True,
        disable=hidden or sys.stderr is None,
        **interval,
    )


def _is_terminal(stream):
    with contextlib.suppress(ValueError):  # it is closed
        return stream is not None and stream.isatty()
    return False


@contextlib.contextmanager
def stage(doing: str) -> Iterator[None]:
    """Announce what is done within the context, and report at growing intervals that it goes on."""
    say(f'{doing} …')
    began, over = time.monotonic(), threading.Event()

    def remind():
        pause = REMINDER
        while not over.wait(pause):
            say(f'… still {doing}, for {time.monotonic() - began:.0f} s')
            pause *= 2

    threading.Thread(target=remind, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def open_regular(path: str | os.PathLike, mode: str = 'r') -> IO[Any]:
    """Open a regular file for reading; a pipe or a device, which could block for ever, is an error.

    Args:
        path: the file.
        mode: 'r' for text in UTF-8, 'rb' for bytes.

    Raises:
        OSError: it does not exist, or is something else.
    """
    return open(path, mode, encoding=None if 'b' in mode else 'utf-8', opener=_regular)


def _regular(path: str, flags: int) -> int:
    """Open a regular file; an `opener`."""
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)  # without O_NONBLOCK a pipe blocks here
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, 'not a regular file', path)
    return descriptor


def read_json(path: str | os.PathLike) -> Any:
    """Return what a JSON file holds.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: it does not hold JSON, or JSON that is nested too deeply.
    """
    with open_regular(path) as file:
        return parse_json(file.read())


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError('it is nested too deeply') from error


def json_sha256(value: Any) -> str:
    """Return the SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: str, value: Any) -> None:
    """Write indented JSON atomically: a reader sees the old file or the new one, never a part.

    Args:
        path: the file; its folder is created if it does not exist.
        value: anything that `json.dump` accepts.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def write_text(path: str, text: str) -> None:
    """Write a text file in UTF-8 atomically: a reader sees the old file or the new one, never a part.

    Args:
        path: the file; its folder is created if it does not exist.
        text: lone surrogates, as in file names that are not valid Unicode, are written as \\udc80, which survives a
            round trip through JSON.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as file:
        file.write(text.encode('utf-8', 'backslashreplace'))


@contextlib.contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """Write a file atomically: a reader sees the old file or the new one, never a part.

    A link of this name is replaced. If it were followed, someone else's folder could determine what is overwritten.

    Args:
        path: the file; its folder is created if it does not exist.

    Yields:
        The new file, which replaces the old one at the end of the context.

    Raises:
        OSError: the file cannot be written.
    """
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path + '.new')
    file = open(path + '.new', 'xb')  # noqa: SIM115 (closed before it is renamed)
    try:
        with file:
            yield file
        os.replace(path + '.new', path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path + '.new')  # on a full disk, others need the room
        raise


def no_link(path: str, flags: int) -> int:
    """Open a regular file, unless it is a link; an `opener` for files that are extended."""
    return _regular(path, flags | os.O_NOFOLLOW)


def file_of_config(workdir: str) -> str:
    """Return the file with the config of a run, or '' if there is none.

    It is config.json or, if that is missing, the file in the newest checkpoint that has a copy under the key 'record'.
    """
    own = os.path.join(workdir, 'config.json')
    if os.path.lexists(own):
        return own
    checkpoints = os.path.join(workdir, 'checkpoints')
    copies = (os.path.join(checkpoints, str(step), 'about', 'metadata') for step in steps_in(checkpoints))
    return next(filter(os.path.lexists, copies), '')


def decimals(error: float) -> int:
    """Return the number of decimals that show two digits of a standard error; at least four."""
    return min(1 - math.floor(math.log10(error)), 10) if 0 < error < 0.001 else 4


def with_error(value: float, error: float) -> str:
    """Return a value and its standard error with equally many decimals."""
    digits = decimals(error)
    return f'{value:.{digits}f} ± {error:.{digits}f}'


def steps_in(checkpoints: str) -> list[int]:
    """Return the steps by which the folders in a folder of checkpoints are named, the newest first."""
    names = os.listdir(checkpoints) if os.path.isdir(checkpoints) else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def signature(function: Any) -> inspect.Signature:
    """Return the signature of a function, or of a class's own __init__, which flax.nnx hides."""
    return inspect.signature(function.__init__ if inspect.isclass(function) else function)


def cache_folder() -> str:
    """Return the folder for files that are kept between runs: $XDG_CACHE_HOME/diffusion, or ~/.cache/diffusion."""
    return os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'diffusion')


def numerics() -> dict[str, Any]:
    """Return the settings of JAX and XLA that numbers depend on, for records. Random keys pin their generator."""
    import jax

    settings = {name: getattr(jax.config, name, None) for name in JAX_SETTINGS}
    for name in COMPILER_FLAGS:
        flags = [flag for flag in os.environ.get(name, '').split() if not flag.startswith(HARMLESS_FLAGS)]
        settings |= {name: flags} if flags else {}
    return settings


def versions() -> dict[str, str]:
    """Return the versions of the software that determines the numbers, for records."""
    packages = {package: importlib.metadata.version(package) for package in ('jax', 'flax', 'numpy')}
    return {'python': platform.python_version(), **packages}


@contextlib.contextmanager
def unfinished(folder: str) -> Iterator[None]:
    """Remove a folder if the context fails, or if a signal ends the process within it."""
    UNFINISHED.add(folder)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        UNFINISHED.discard(folder)


def lock(file: IO) -> bool:
    """Lock a file for this process; return False if its file system has no locks, as some NFS and Lustre mounts.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    for lock in (fcntl.flock, fcntl.lockf):  # some have one kind only
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno == errno.EACCES:  # lockf may say so instead
                raise BlockingIOError(error.errno, error.strerror) from error
            if error.errno not in NO_LOCKS:
                raise
    return False


class FileLock:
    """Context manager that holds a lock file until the process ends, however it ends.

    The file names the process that holds it. Where the file system has no locks, it warns and holds none.
    """

    def __init__(self, path: str):
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> 'FileLock':
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file:
            self._file.close()

    def acquire(self) -> None:
        """Acquire the lock; call it again after the file was `lost`.

        Raises:
            BlockingIOError: another process holds the lock; the message names the process and its host.
            OSError: the file cannot be written.
        """
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        file = open(self._path, 'a+', encoding='utf-8', opener=no_link)  # noqa: SIM115 (held open)
        try:
            if not lock(file):
                folder = os.path.dirname(self._path)
                warn(f'the file system of {folder} has no locks: make sure that no other process trains there')
        except BlockingIOError as error:
            with file:
                file.seek(0)
                raise BlockingIOError(f'{file.read().strip()} holds it') from error
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        if self._file:
            self._file.close()
        self._file = file

    def lost(self) -> bool:
        """Return whether the lock file was removed, moved or became unreadable, so that the lock may be another's."""
        if self._file is None:
            return True
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except OSError:  # nothing is there, or a file in the place of the folder, or a network's file system fails
            return True


@contextlib.contextmanager
def exclusive(path: str, waiting: str) -> Iterator[None]:
    """Hold a lock file within the context; if another process holds it, print `waiting` and wait.

    Raises:
        OSError: the file cannot be written, or its file system has no locks.
    """
    with open(path, 'w', encoding='utf-8', opener=no_link) as file:
        waits = False
        while True:
            try:
                if not lock(file):
                    raise OSError(errno.ENOLCK, 'its file system has no locks')
                break
            except BlockingIOError:
                if not waits:
                    say_here(waiting)
                waits = True
                time.sleep(0.2)
        yield


class RunError(Exception):
    """An error of the user's input or machine, not a bug; the message states what was found and what to do."""


@contextlib.contextmanager
def npy_header(name: str = 'the array') -> Iterator[None]:
    """Raise ValueError where NumPy, for some damaged headers of .npy files, lets errors of Python's parser through."""
    try:
        yield
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f'the header of {name} is damaged ({error})') from error


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Turn a ValueError within the context into a RunError that names the part of the config it came from."""
    try:
        yield
    except ValueError as error:
        raise RunError(f'{key}: {error}') from error
