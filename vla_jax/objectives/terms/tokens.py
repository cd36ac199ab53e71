"""The cross-entropy of tokens that are known: of text, and of chunks that are written as FAST tokens."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.objectives.cross_entropy import CrossEntropy, cross_entropy
from vla_jax.objectives.terms.base import Reading
from vla_jax.types import Batch


class ChunkTokens(NamedTuple):
    """Chunks as FAST tokens: the fields `action_token…` of `Batch`."""

    tokens: Int[Array, "b g"]
    mask: Bool[Array, "b g"]
    is_target: Bool[Array, "b g"]


def chunk_tokens(batch: Batch) -> ChunkTokens:
    """The chunks' tokens of a batch. Raises ValueError where it has none."""
    tokens, mask, is_target = batch.action_tokens, batch.action_token_mask, batch.action_token_loss
    if tokens is None or mask is None or is_target is None:
        raise ValueError(
            "the batch has no action tokens (action_tokens, action_token_mask, action_token_loss); "
            "make it with a data pipeline that writes chunks as tokens"
        )
    return ChunkTokens(tokens, mask, is_target)


def at_targets(
    reading: Reading,
    hidden: Float[Array, "b _ d"],
    tokens: Int[Array, "b l"],
    is_target: Bool[Array, "b l"],
    most: int | None,
) -> CrossEntropy:
    """Sums over the target tokens. The token at position i is predicted from the output at i-1.

    Logits are computed only there: the target positions of each sample, at most `most`, are gathered first, because
    logits of a whole row of 257,152 tokens would not fit; see `objectives/cross_entropy.py`.
    """
    length = tokens.shape[1]
    size = min(most or length, length - 1)
    positions = _first_true(is_target[:, 1:], size) + 1  # b g
    valid = jnp.take_along_axis(is_target, positions, axis=1)
    labels = jnp.take_along_axis(tokens, positions, axis=1)
    inputs = jnp.take_along_axis(hidden, positions[..., None] - 1, axis=1)
    return cross_entropy(reading.apply("output_table"), inputs, labels, valid)


def of_action_tokens(reading: Reading) -> CrossEntropy:
    """Sums over the chunks' FAST tokens, which see of the prefix what an expert sees, and one another causally."""
    chunk = chunk_tokens(reading.batch)
    hidden = reading.apply("extend", reading.context, chunk.tokens[:, :-1], chunk.mask[:, :-1])
    return at_targets(reading, hidden, chunk.tokens, chunk.is_target, reading.action_targets)


def _first_true(mask: Bool[Array, "b l"], size: int) -> Int[Array, "b g"]:
    """Positions of the first `size` True entries of each row; False entries fill what is left."""
    return jnp.argsort(~mask, axis=1, stable=True)[:, :size]
