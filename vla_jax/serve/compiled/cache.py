"""Compiled programs kept on disk, so that the next start need not compile them again."""

import os

import jax


def keep_programs(directory: str | os.PathLike) -> None:
    """From here on XLA's programs are written to `directory` and read from it, small ones too.

    A program is found again by everything that made it (code, shapes, versions, device), so a directory may be shared.
    """
    os.makedirs(directory, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
