"""Helpers that several parts of the project share: files, locks, errors, output."""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import stat
from collections.abc import Iterator
from typing import IO, Any, TextIO

import jax

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


def say(message: str = '') -> None:
    """Print a line, on the first host only."""
    if jax.process_index() == 0:
        print(message, flush=True)


def open_regular(path: str | os.PathLike, mode: str = 'r') -> IO[Any]:
    """Open a regular file for reading; a pipe or a device, which could block for ever, is an error.

    Args:
        path: the file.
        mode: 'r' for text in UTF-8, 'rb' for bytes.

    Raises:
        OSError: it does not exist, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK a pipe blocks here
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, 'not a regular file', os.fspath(path))
    return open(descriptor, mode, encoding=None if 'b' in mode else 'utf-8')


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
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path + '.new')  # it may be a link or a pipe
    with open(path + '.new', 'w', encoding='utf-8', errors='backslashreplace') as file:
        file.write(text)
    os.replace(path + '.new', path)


def cache_folder() -> str:
    """Return the folder of what is kept between runs: $XDG_CACHE_HOME/diffusion, or ~/.cache/diffusion."""
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


class FileLock:
    """Context manager that holds a lock file until the process ends, however it ends.

    The file names the process that holds it.
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
        file = open(self._path, 'a+', encoding='utf-8')  # noqa: SIM115 (held open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        """Return whether the lock file was removed or moved, so that another process could acquire the lock."""
        if self._file is None:
            return True
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return True


@contextlib.contextmanager
def exclusive(path: str, waiting: str) -> Iterator[None]:
    """Hold a lock file within the context; if another process holds it, print `waiting` and wait.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, 'w', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class RunError(Exception):
    """An error of the user's input or surroundings, not a bug; the message says what was found and what to do."""


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Turn a ValueError within the context into a RunError that names the part of the config it came from."""
    try:
        yield
    except ValueError as error:
        raise RunError(f'{key}: {error}') from error
