"""Compiled programs on disk."""

import os

import jax
from jax.experimental.compilation_cache import compilation_cache

MIN_SECONDS = 0.2  # programs that compile faster than this are not worth a file


def cache_programs(folder: str) -> None:
    """Keep compiled programs in a folder, where later runs find them instead of compiling again.

    JAX has one compilation cache per process, so this applies to every program compiled afterwards.

    Args:
        folder: may begin with '~'; it is created when the first program is written.
    """
    jax.config.update('jax_compilation_cache_dir', os.path.abspath(os.path.expanduser(folder)))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', MIN_SECONDS)
    compilation_cache.reset_cache()  # otherwise JAX keeps the cache it had at its first compilation
