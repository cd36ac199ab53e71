"""A model's inputs and parameters as shapes: nothing is allocated or computed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from vla_jax.models.config import VLAConfig
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
