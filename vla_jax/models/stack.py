"""A stack of equal blocks as one scan: compiled once, parameters stacked along a leading `layers` axis.

What the backward pass keeps of each block, and what it computes again, has a name (`model.remat`), from little
memory to little work:

| name                                | kept on the device                      | computed again                     |
|-------------------------------------|-----------------------------------------|------------------------------------|
| offload_inputs                      | nothing: inputs go to the host's memory | everything                         |
| nothing_saveable                    | the block's input                       | everything                         |
| save_context                        | + what attention put together           | all but attention's sum            |
| save_attention                      | + queries, keys, values                 | norms, the feed-forward layer      |
| offload_dots                        | input; matrix products go to the host   | norms, elementwise operations      |
| dots_with_no_batch_dims_saveable    | every product with a weight             | norms, elementwise, attention      |
| none                                | whatever the backward pass reads        | nothing                            |
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from vla_jax.layers.linear import SUM

INPUT, PROJECTED, CONTEXT = "block_input", "projected", "context"
"""Names that blocks give with `named`: their input, their queries, keys and values, attention's weighted sum."""

named = checkpoint_name


def _with_sums(dots: Callable[..., Any], sums: Callable[..., Any]) -> Callable[..., Any]:
    """A policy of products with weights that takes LoRA's sum of two products for one.

    The two themselves are float32: kept in place of their rounded sum they would take four times its memory.
    """

    def policy(primitive, *operands, **params):
        if primitive.name == "name":
            return sums(primitive, *operands, **params)
        wider = params.get("preferred_element_type")
        if wider is not None and any(wider != operand.dtype for operand in operands):
            return sums(primitive, *operands, **params)
        return dots(primitive, *operands, **params)

    return policy


_OFFLOAD = dict(offload_src="device", offload_dst="pinned_host")

POLICIES: dict[str, Callable[..., Any]] = {
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "save_context": jax.checkpoint_policies.save_only_these_names(CONTEXT),
    "save_attention": jax.checkpoint_policies.save_only_these_names(CONTEXT, PROJECTED),
    "dots_with_no_batch_dims_saveable": _with_sums(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SUM),
    ),
    "offload_inputs": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[INPUT], **_OFFLOAD
    ),
    "offload_dots": _with_sums(
        jax.checkpoint_policies.offload_dot_with_no_batch_dims(**_OFFLOAD),
        jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[SUM], **_OFFLOAD
        ),
    ),
}
"""Name → what `jax.checkpoint` may keep, or send to the host's memory and fetch back."""


def scan_blocks(
    block: type[nn.Module], *, depth: int, remat: str, unroll: int, in_axes: Sequence[Any] = ()
) -> type[nn.Module]:
    """Turns a block `(x, *inputs) → (x, per-layer output)` into `depth` of them.

    `in_axes` has one entry per further input: 0 where it holds one slice per layer, `nn.broadcast` where all
    layers share it. Per-layer outputs are stacked along axis 0. `remat` is a name of `POLICIES`, or ``none``.
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=tuple(in_axes),
        length=depth,
        unroll=min(unroll, depth),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
