"""Checkpoints: one directory that needs nothing else."""

from vla_jax.checkpoint.manager import Checkpoints, Restored
from vla_jax.checkpoint.read import (
    CorruptCheckpointError,
    UnreachableCheckpointError,
    load,
    load_params,
    params_shapes,
    read_meta,
)

__all__ = [
    "Checkpoints",
    "CorruptCheckpointError",
    "Restored",
    "UnreachableCheckpointError",
    "load",
    "load_params",
    "params_shapes",
    "read_meta",
]
