"""The training step as one jitted program: what runs in the loop, and what `vla_jax.aot` compiles for a pod."""

from collections.abc import Callable
from typing import Any

import jax

from vla_jax.sharding import batch_sharding, replicated
from vla_jax.train.state import StateBuilder, TrainState
from vla_jax.types import Batch


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
    )
