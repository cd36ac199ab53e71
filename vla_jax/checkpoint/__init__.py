"""Checkpoints: one directory that needs nothing else."""

from vla_jax.checkpoint.failures import CorruptCheckpointError, UnreachableCheckpointError
from vla_jax.checkpoint.manager import Checkpoints, Restored
from vla_jax.checkpoint.read import (
    Saved,
    load,
    load_params,
    open_newest,
    read_meta,
)

__all__ = [
    "Checkpoints",
    "CorruptCheckpointError",
    "Restored",
    "Saved",
    "UnreachableCheckpointError",
    "load",
    "load_params",
    "open_newest",
    "read_meta",
]
