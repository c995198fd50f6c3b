"""Compilation of programs, and the cache of compiled programs on disk."""

import contextlib
import glob
import os
import stat
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.compilation_cache import decompress_executable
from jax.experimental.compilation_cache import compilation_cache

from diffusion.util import RunError, first_line, stage

LOST = ('UNAVAILABLE', 'DEADLINE_EXCEEDED', 'ABORTED', 'CANCELLED')  # XLA's status codes if another host has failed
MIN_SECONDS = 0.2  # programs that compile faster than this are not worth a file
LARGEST_CACHE = 5e9  # bytes; if the cache is larger, its oldest programs are removed


def private_folder(path: str) -> str:
    """Make a folder for compiled programs, or check the one that exists.

    A compiled program is machine code that runs as the user, so nobody else may be able to put one there.

    Args:
        path: may begin with '~'.

    Returns:
        The absolute path.

    Raises:
        OSError: the folder cannot be made, belongs to someone else, or can be written by others.
    """
    path = os.path.abspath(os.path.expanduser(path))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        found = os.stat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(f'{path} must be a folder that only you can write (chmod 700), and is not') from None
    _remove_oldest(path)
    return path


def _programs(folder: str) -> list[str]:
    """Return the files that hold programs, the newest first. Whatever else the folder holds is not ours to remove."""
    times = {}
    for path in glob.glob(os.path.join(glob.escape(folder), '*-cache')):  # as JAX names them
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                times[path] = status.st_mtime
    return sorted(times, key=lambda path: times[path], reverse=True)


def _remove_oldest(folder: str) -> None:
    """Remove the oldest programs, so that the rest take at most LARGEST_CACHE."""
    total = 0
    for path in _programs(folder):
        with contextlib.suppress(FileNotFoundError):
            total += os.path.getsize(path)
            if total > LARGEST_CACHE:
                os.remove(path)


def _remove_cut_short(folder: str) -> None:
    """Remove the newest program if its process ended while it was writing: JAX would never write it again."""
    for newest in _programs(folder)[:1]:
        with contextlib.suppress(OSError):  # another process was faster
            with open(newest, 'rb') as file:
                content = file.read()
            try:
                decompress_executable(content)
            except Exception:  # of zstd or zlib
                os.remove(newest)


def cache_programs(folder: str) -> None:
    """Keep compiled programs in a folder, where later runs find them instead of compiling again.

    JAX has one compilation cache per process, so this applies to every program compiled afterwards.

    Args:
        folder: may begin with '~'; it is created when the first program is written.
    """
    folder = os.path.abspath(os.path.expanduser(folder))
    _remove_cut_short(folder)
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', MIN_SECONDS)
    compilation_cache.reset_cache()  # otherwise JAX keeps the cache it had at its first compilation


def deterministic(platform: str) -> dict[str, Any]:
    """Return XLA's options with which a program computes the same bits at each run, on one kind of device.

    On GPUs, atomic additions happen in any order, and the fastest algorithms are chosen by timing them. On CPUs and
    TPUs no option is needed.

    Args:
        platform: of the devices, such as 'gpu'.
    """
    return {'xla_gpu_deterministic_ops': True} if platform == 'gpu' else {}


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Announce a compilation within the context, and report at intervals that it goes on.

    Args:
        what: the name of the program, for the messages.

    Raises:
        RunError: XLA cannot compile it, which another start would not change.
    """
    kept = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    faster = ' (the next start is faster)' if kept else ''
    try:
        with stage(f'compiling {what}{faster}'):
            yield
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith(('RESOURCE_EXHAUSTED', *LOST)):  # reported as such
            raise
        raise RunError(f'XLA cannot compile {what}: {first_line(error)}') from error
