"""A model's inputs and parameters as shapes: nothing is allocated or computed."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta

from vla_jax.models.config import VLAConfig
from vla_jax.models.stack import STACKS
from vla_jax.models.vla import VLA
from vla_jax.types import Batch, PyTree


def abstract_batch(
    config: VLAConfig, *, rows: int = 1, text_tokens: int = 1, actions: bool = True, chunk_tokens: int = 0
) -> Batch:
    """Shapes of a batch: texts of `text_tokens`, chunks where `actions`, chunks of `chunk_tokens` as FAST tokens."""
    expert, size = config.expert, config.backbone.image_size

    def shape(dtype: Any, *sizes: int) -> Any:  # a shape where `Batch` declares an array
        return jax.ShapeDtypeStruct((rows, *sizes), dtype)

    chunk: dict[str, Any] = {}
    if chunk_tokens:
        chunk |= dict(action_tokens=shape(jnp.int32, chunk_tokens))
        mask = shape(jnp.bool_, chunk_tokens)
        chunk |= dict(action_token_mask=mask, action_token_loss=mask)
    if actions:
        chunk |= dict(actions=shape(jnp.float32, expert.horizon, expert.action_dim))
        chunk |= dict(action_mask=shape(jnp.bool_, expert.horizon, expert.action_dim))
    text = shape(jnp.bool_, text_tokens)
    return Batch(
        **chunk,
        images={camera: shape(jnp.uint8, size, size, 3) for camera in config.cameras},
        image_mask={camera: shape(jnp.bool_) for camera in config.cameras},
        state=shape(jnp.float32, expert.state_dim),
        tokens=shape(jnp.int32, text_tokens),
        token_mask=text,
        token_causal=text,
        token_loss=text,
    )


@functools.cache
def abstract_params(config: VLAConfig) -> PyTree:
    """The parameters' shapes, in boxes that name their axes, as `VLA.init` makes them."""
    batch = abstract_batch(config)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(VLA(config).init, key, batch, batch.actions, time)["params"]


def axes(config: VLAConfig) -> dict[str, dict[str | None, int]]:
    """The sizes of every parameter's axes by their logical names; the last of axes with one name."""
    found = jax.tree.leaves_with_path(
        abstract_params(config), is_leaf=lambda x: isinstance(x, meta.AxisMetadata)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): dict(zip(box.names, box.value.shape))
        for path, box in found
    }


class Stack(NamedTuple):
    """Sizes of a stack of equal blocks, from its parameters alone."""

    path: str
    depth: int
    width: int
    heads: int
    """Attention heads."""
    head_width: int
    """Width of all heads together: heads · head_dim."""
    projected: int
    """Queries, keys and values of one token."""
    hidden: int
    """What the feed-forward layer's first product gives for one token (gate and up together)."""


def stacks(config: VLAConfig) -> list[Stack]:
    """All stacks of a model's blocks."""
    grouped: dict[str, list[tuple[dict[str | None, int], int]]] = {}
    for (path, sizes), leaf in zip(axes(config).items(), jax.tree.leaves(abstract_params(config))):
        parts = path.split("/")
        if (start := next((i for i, part in enumerate(parts) if part in STACKS), None)) is not None:
            grouped.setdefault("/".join(parts[: start + 1]), []).append((sizes, math.prod(leaf.shape)))
    return [_stack(path, leaves) for path, leaves in grouped.items()]


def _stack(path: str, leaves: list[tuple[dict[str | None, int], int]]) -> Stack:
    """A stack's sizes, read off the axes and numbers of elements of its parameters."""
    depth = next(sizes["layers"] for sizes, _ in leaves)
    width = max(sizes.get("embed", 1) for sizes, _ in leaves)
    heads = max(sizes.get("heads", 1) for sizes, _ in leaves)
    head_width = heads * max((sizes.get("head_dim", 1) for sizes, _ in leaves if "heads" in sizes), default=1)

    def per_token(*names: str) -> int:
        of = (n for sizes, n in leaves if "embed" in sizes and any(name in sizes for name in names))
        return sum(of) // (depth * width)

    # Without the way back from the heads, which is as large as the queries, and without the second product.
    projected = per_token("heads", "kv_heads") - head_width
    hidden = per_token("mlp") - max(sizes.get("mlp", 0) for sizes, _ in leaves)
    return Stack(path, depth, width, heads, head_width, projected, hidden)
