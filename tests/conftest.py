"""Shared by all tests: they run on CPU, and compile fast rather than run fast."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes most of the tests' time
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
