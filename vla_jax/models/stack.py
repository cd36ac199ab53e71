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
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vla_jax.layers.linear import SUM
from vla_jax.types import PyTree

INPUT, PROJECTED, CONTEXT = "block_input", "projected", "context"
"""Names that blocks give with `named`: their input, their queries, keys and values, attention's weighted sum."""

named = checkpoint_name

Part = TypeVar("Part")

STACKS = ("layers", "encoderblock")
"""Names under which modules declare blocks; their parameters carry the layers as first axis."""


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


def declare_blocks(
    module: nn.Module,
    name: str,
    block: type[nn.Module],
    arguments: Sequence[Any],
    *,
    depth: int,
    remat: str,
    unroll: int,
    methods: Sequence[str] = ("__call__",),
) -> Any:
    """`depth` blocks, as an attribute of that name: ``self.layers = declare_blocks(self, "layers", …)`` in setup.

    Each method of a block is `(x, own, shared) → (x, output)`: `own` has one entry per layer, `shared` is for all.
    Parameters are stacked in ``layers``, or are ``layers_0``, ``layers_1``, … (`unstacked`): the same network, run
    without a scan. On CPU a scan copies its slice of the stack at every use, and what nobody reads of the last layer is
    left out by the compiler only where layers are apart.

    `remat` is a name of `POLICIES`, or ``none``.
    """
    if module.has_variable("params", f"{name}_0"):
        return [block(*arguments) for _ in range(depth)]
    if remat != "none":
        # Inside a scan XLA cannot merge what is computed again with the forward pass (`jax.checkpoint`).
        block = nn.remat(block, prevent_cse=False, policy=POLICIES[remat])
    in_axes: Any = (0, nn.broadcast)  # Flax declares an int
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=depth,
        unroll=min(unroll, depth),
        metadata_params={nn.PARTITION_NAME: "layers"},
        methods=methods,
    )
    return scanned(*arguments)


def run_blocks(
    blocks: Any, x: Any, own: PyTree = None, shared: PyTree = None, method: str = "__call__"
) -> tuple[Any, PyTree]:
    """The last block's x, and the outputs of all: stacked along axis 0, or a tuple of one entry per layer.

    So may be the leaves of `own`.
    """
    if not isinstance(blocks, (list, tuple)):
        return getattr(blocks, method)(x, _map_layers(jnp.stack, own), shared)
    outputs = []
    for i, block in enumerate(blocks):
        x, output = getattr(block, method)(x, _pick(own, i), shared)
        outputs.append(output)
    return x, jax.tree.map(lambda *each: each, *outputs)


def needed(part: Part | None, what: str) -> Part:
    """A part of what blocks are given that one of their methods needs. Raises ValueError where it is None."""
    if part is None:
        raise ValueError(f"blocks are run without {what}, which they need; give it to run_blocks")
    return part


def _map_layers(change: Callable[..., Any], tree: PyTree) -> PyTree:
    """Applies `change` to every leaf that is a tuple of one array per layer."""
    return jax.tree.map(lambda x: change(x) if _apart(x) else x, tree, is_leaf=_apart)


def _pick(tree: PyTree, i: int) -> PyTree:
    """Layer number i of leaves that are stacked or a tuple."""
    return jax.tree.map(lambda x: x[i], tree, is_leaf=_apart)


def _apart(x: Any) -> bool:
    return isinstance(x, tuple) and not hasattr(x, "_fields")


def unstacked(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the same network with every stack of `layers` taken apart.

    Image encoders' stay stacked: on CPU (XLA of JAX 0.10) their blocks one after another take longer than in a scan.
    """
    apart: dict[str, Any] = {}
    for name, value in params.items():
        if name == STACKS[0] and isinstance(value, dict):
            depth = jax.tree.leaves(value)[0].shape[0]
            apart |= {f"{name}_{i}": _pick(value, i) for i in range(depth)}
        else:
            apart[name] = unstacked(value) if isinstance(value, dict) else value
    return apart
