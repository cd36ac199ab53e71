"""A stack of equal blocks as one scan: compiled once, parameters stacked along a leading `layers` axis."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax


def scan_blocks(
    block: type[nn.Module], *, depth: int, remat: str, unroll: int, in_axes: Sequence[Any] = ()
) -> type[nn.Module]:
    """Turns a block `(x, *inputs) → (x, per-layer output)` into `depth` of them.

    `in_axes` has one entry per further input: 0 where it holds one slice per layer, `nn.broadcast` where all
    layers share it. Per-layer outputs are stacked along axis 0. `remat` names a policy of
    `jax.checkpoint_policies`, or ``none``.
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=getattr(jax.checkpoint_policies, remat))
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=tuple(in_axes),
        length=depth,
        unroll=min(unroll, depth),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
