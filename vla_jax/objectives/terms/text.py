"""The cross-entropy of the text targets, per token.

FAST tokens of the chunk beside continuous actions are text too (π0.5 with knowledge insulation, arXiv:2505.23705): the
backbone learns from them, and the expert does not see them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.terms.base import Reading, Term, TermSums, elements_per_sample
from vla_jax.objectives.terms.tokens import at_targets, chunk_tokens, of_action_tokens
from vla_jax.types import Batch, PyTree


class TextTerm(Term):
    """CE(text). Its weight is 1: the other terms' λ are relative to it."""

    def count(self, batch: Batch, config: ObjectiveConfig, drawn: PyTree) -> Float[Array, ""]:
        """The number of target tokens."""
        return jnp.sum(text_targets(batch)).astype(jnp.float32)

    def sums(self, reading: Reading, drawn: PyTree) -> TermSums:
        """Cross-entropy over the targets, and how many of them are the likeliest token."""
        batch = reading.batch
        if reading.hidden is None:
            raise ValueError(
                "objective.text=True, but the backbone has no language model; use objective.text=False"
            )
        loss, correct = at_targets(
            reading, reading.hidden, batch.tokens, batch.token_loss, reading.target_tokens
        )
        if _has_chunk(batch):
            more, more_correct = of_action_tokens(reading)
            loss, correct = loss + more, correct + more_correct
        return TermSums(loss, {"correct": correct})

    def metrics(self, found: TermSums, count: Float[Array, ""]) -> dict[str, Float[Array, "..."]]:
        """The share of targets that are the likeliest token."""
        return {"text_accuracy": found.reported["correct"] / count}

    def scale(self, batch: Batch, config: ObjectiveConfig) -> Float[Array, ""]:
        """As `objective.text_reduction` says: per token, or per answer."""
        return elements_per_sample(text_targets(batch), config.text_reduction)


def text_targets(batch: Batch) -> Bool[Array, "b l"]:
    """Which tokens are learned as text: targets, and action tokens beside continuous actions."""
    if not _has_chunk(batch):
        return batch.token_loss
    return jnp.concatenate([batch.token_loss, chunk_tokens(batch).is_target], axis=1)


def _has_chunk(batch: Batch) -> bool:
    """Whether the batch holds chunks as tokens beside continuous actions."""
    return batch.actions is not None and batch.action_tokens is not None
