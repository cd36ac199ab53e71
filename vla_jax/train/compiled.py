"""The training step as one jitted program: what runs in the loop, and what `vla_jax.aot` compiles for a pod."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from vla_jax.sharding import batch_sharding, replicated
from vla_jax.train.state import StateBuilder, TrainState
from vla_jax.types import Batch

ALWAYS = ("xla_jf_spmd_threshold_for_windowed_einsum_mib=1048576",)
"""A TPU's compiler may cut a product with gathered parameters into as many small ones as devices hold them, to overlap
each with a part of the gathering; on 16 chips π0's products then take twice as long (benchmarks/RESULTS.md). Its
scheduler overlaps whole gathers with whole products by itself."""

_ONLY = {"xla_tpu_": "tpu", "xla_jf_": "tpu", "xla_gpu_": "gpu", "xla_cpu_": "cpu"}


def xla_options(platform: str, more: Sequence[str] = ()) -> dict[str, str]:
    """The compiler options for a platform, of `train.xla` and those that always are; others' are left out."""
    options = {}
    for text in (*ALWAYS, *more):
        name, _, value = text.partition("=")
        only = next((found for prefix, found in _ONLY.items() if name.startswith(prefix)), platform)
        if only == platform:
            options[name] = value
    return options


def jit_train_step(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]],
    builder: StateBuilder,
    xla: Sequence[str] = (),
) -> jax.stages.Wrapped:
    """`(state, batch) → (state, metrics)` with explicit shardings; the state is donated. Lower it within `activate`.

    `xla`: compiler options, name=value.
    """
    mesh = builder.mesh
    return jax.jit(
        train_step,
        in_shardings=(builder.shardings, batch_sharding(mesh)),
        out_shardings=(builder.shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=xla_options(mesh.devices.flat[0].platform, xla) or None,
    )
