"""Shared by all tests: they run on CPU, and compile fast rather than run fast."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes most of the tests' time
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Compiled programs are kept for the other test processes, for those that tests start, and for the next run.
# `pytest --cache-clear` empties the folder.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache/d/programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest

from tests.shapes import check_shapes

check_shapes()  # before any test imports vla_jax


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module_at_a_time():
    """Compiled programs go when their file is done: thousands of them are gigabytes, and more memory mappings than the
    kernel gives a process (an abort inside the compiler)."""
    yield
    import gc

    import jax

    jax.clear_caches()
    gc.collect()
