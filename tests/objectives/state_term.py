"""A third term of the objective, as somebody would add one: this file, and one line in `TERMS`.

The state of the robot is read off the prompt: the mean of the outputs at its tokens has to hold the state in its first
dimensions. It has no parameters of its own, so all of its gradient goes into the backbone.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.terms.base import Reading, Term, TermSums
from vla_jax.types import Batch, PyTree


class StateTerm(Term):
    """The squared error of the state, per dimension."""

    def count(self, batch: Batch, config: ObjectiveConfig, drawn: PyTree) -> Float[Array, ""]:
        """Dimensions of all samples that have a prompt; padding of a batch has none."""
        return jnp.sum(batch.token_mask.any(axis=1)).astype(jnp.float32) * batch.state.shape[1]

    def sums(self, reading: Reading, drawn: PyTree) -> TermSums:
        """The error of the samples that have a prompt."""
        batch = reading.batch
        prompt = (batch.token_mask & ~batch.token_causal)[..., None]
        mean = jnp.sum(jnp.where(prompt, reading.hidden, 0), axis=1) / jnp.maximum(jnp.sum(prompt, axis=1), 1)
        error = (mean[:, : batch.state.shape[1]].astype(jnp.float32) - batch.state) ** 2
        return TermSums(jnp.sum(jnp.where(batch.token_mask.any(axis=1)[:, None], error, 0)), {})
