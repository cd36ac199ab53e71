"""Device mesh, the table of sharding rules, the placement report."""

from vla_jax.sharding.config import MeshConfig
from vla_jax.sharding.mesh import batch_sharding, check_batch, local_rows, make_mesh, replicated
from vla_jax.sharding.report import placement
from vla_jax.sharding.rules import RULES, activate, shardings

__all__ = [
    "RULES",
    "MeshConfig",
    "activate",
    "batch_sharding",
    "check_batch",
    "local_rows",
    "make_mesh",
    "placement",
    "replicated",
    "shardings",
]
