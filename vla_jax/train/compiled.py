"""The training step as one jitted program: what runs in the loop, and what `vla_jax.aot` compiles for a pod."""

from collections.abc import Callable
from typing import Any

import jax

from vla_jax.sharding import batch_sharding, replicated
from vla_jax.train.state import StateBuilder, TrainState
from vla_jax.types import Batch


XLA_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 2**20}}
"""Compiler options by platform. A TPU's compiler may cut a product with gathered parameters into as many small ones as
devices hold them, to overlap each with a part of the gathering; on 16 chips π0's products then take twice as long
(benchmarks/RESULTS.md). The scheduler overlaps whole gathers with whole products by itself."""


def jit_train_step(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]], builder: StateBuilder
) -> jax.stages.Wrapped:
    """`(state, batch) → (state, metrics)` with explicit shardings; the state is donated. Lower it within `activate`."""
    mesh = builder.mesh
    return jax.jit(
        train_step,
        in_shardings=(builder.shardings, batch_sharding(mesh)),
        out_shardings=(builder.shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=XLA_OPTIONS.get(mesh.devices.flat[0].platform),
    )
