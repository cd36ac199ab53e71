"""Device mesh, the table of sharding rules, the placement report."""

from vla_jax.sharding.config import MeshConfig
from vla_jax.sharding.mesh import (
    batch_sharding,
    check_batch,
    check_prefix,
    local_rows,
    make_mesh,
    replicated,
)
from vla_jax.sharding.report import check_unsharded, placement
from vla_jax.sharding.rules import RULES, activate, shardings

__all__ = [
    "RULES",
    "MeshConfig",
    "activate",
    "batch_sharding",
    "check_batch",
    "check_prefix",
    "check_unsharded",
    "local_rows",
    "make_mesh",
    "placement",
    "replicated",
    "shardings",
]
