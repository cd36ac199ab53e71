"""Shared by all tests: CPU, and shape checking of every jaxtyping annotation."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
