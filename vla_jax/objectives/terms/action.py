"""The loss of the actions: the process's error of the expert's prediction, per element of the chunk.

Where a batch holds chunks as FAST tokens in place of continuous actions, it is their cross-entropy, per token: then
there is no noise to draw and no time.

**Insulation** belongs to this term: κ scales what its loss sends back into the backbone through the context.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.flow.processes import Process
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.keys import named
from vla_jax.objectives.terms.base import LossByTime, Reading, Term, TermSums, elements_per_sample
from vla_jax.objectives.terms.tokens import chunk_tokens, of_action_tokens
from vla_jax.types import Batch, Given

TIME_BINS = 10
"""Bins of flow time in [0, 1] by which times and action losses are reported."""


class ActionDraws(NamedTuple):
    """Noisy chunks for a batch, K draws per sample."""

    x_t: Float[Array, "b draws k a"]
    t: Float[Array, "b draws"]
    target: Float[Array, "b draws k a"]
    prefix: Int[Array, "b draws"] | None = None
    """How many actions of each draw are clean: the beginning of a chunk that is being executed."""


class ActionTerm(Term):
    """The error of the expert, or of the action tokens. Its weight is `objective.action_weight`."""

    def draw(
        self, key: PRNGKeyArray, batch: Batch, process: Process, config: ObjectiveConfig
    ) -> ActionDraws | None:
        """Times and noise. Masked elements are zeros before the noise comes, so that no padding is ever read."""
        if batch.actions is None:
            return None
        b, draws = batch.tokens.shape[0], config.noise_draws
        clean = jnp.where(_valid(batch), batch.actions, 0)
        corrupted = process.corrupt(named(key, "action/noise"), jnp.repeat(clean, draws, axis=0))

        def group(x: Array) -> Array:
            return x.reshape(b, draws, *x.shape[1:])

        x_t, prefix = group(corrupted.x_t), None
        if config.rtc_prefix:
            prefix = jax.random.randint(named(key, "action/prefix"), (b, draws), 0, config.rtc_prefix + 1)
            x_t = jnp.where(in_prefix(prefix, x_t.shape[2])[..., None], clean[:, None], x_t)
        return ActionDraws(x_t=x_t, t=group(corrupted.t), target=group(corrupted.target), prefix=prefix)

    def count(self, batch: Batch, config: ObjectiveConfig, drawn: ActionDraws | None) -> Float[Array, ""]:
        """Elements with a loss, of all draws; of tokens, how many are predicted."""
        if batch.actions is None:
            return jnp.sum(chunk_tokens(batch).is_target).astype(jnp.float32)
        if drawn is not None and drawn.prefix is not None:  # how much is learned depends on what was drawn
            return jnp.sum(learned(batch, config, drawn)).astype(jnp.float32)
        return jnp.sum(scored(batch, config)).astype(jnp.float32) * config.noise_draws

    def sums(self, reading: Reading, drawn: ActionDraws | None) -> TermSums:
        """The error; by bin of t how much of it there is, in how many draws and elements."""
        if drawn is None:
            return TermSums(of_action_tokens(reading).loss, {})
        error = action_error(reading, drawn)
        member = _members(drawn.t, TIME_BINS)
        mask = learned(reading.batch, reading.config, drawn)
        elements = jnp.broadcast_to(jnp.sum(mask, axis=(2, 3)), drawn.t.shape).astype(jnp.float32)
        by_draw = jax.lax.stop_gradient(jnp.sum(error, axis=(2, 3)))
        reported = {
            "draws": jnp.sum(member, axis=(0, 1)),
            "error": jnp.einsum("br,brn->n", by_draw, member),
            "elements": jnp.einsum("br,brn->n", elements, member),
        }
        return TermSums(jnp.sum(error), reported)

    def metrics(self, found: TermSums, count: Float[Array, ""]) -> dict[str, Float[Array, "..."]]:
        """Means by bin of t, 0 where a bin is empty, and how many draws fell into each."""
        if not found.reported:
            return {}
        by_time = found.reported["error"] / jnp.maximum(found.reported["elements"], 1)
        return {"time_histogram": found.reported["draws"], "action_loss_by_time": by_time}

    def scale(self, batch: Batch, config: ObjectiveConfig) -> Float[Array, ""]:
        """As `objective.action_reduction` says: per element, or per chunk (of which a clean prefix is a part)."""
        mask = chunk_tokens(batch).is_target if batch.actions is None else scored(batch, config)
        return elements_per_sample(mask, config.action_reduction)

    def by_time(self, reading: Reading, drawn: ActionDraws, count: Float[Array, ""], bins: int) -> LossByTime:
        """The mean error of each bin of t. A configuration of tokens is never asked."""
        error = action_error(reading, drawn)
        member = _members(drawn.t, bins)
        valid = jnp.broadcast_to(learned(reading.batch, reading.config, drawn), error.shape)
        elements = jnp.einsum("brka,brn->n", valid.astype(jnp.float32), member)
        sums = jnp.einsum("brka,brn->n", error, member)
        return LossByTime(sums / jnp.maximum(elements, 1), elements / count)


def action_error(reading: Reading, drawn: ActionDraws) -> Float[Array, "b draws k a"]:
    """Elementwise loss of the expert's prediction, zero where nothing is learned. A clean prefix has t = 1."""
    context = reading.context
    if not isinstance(reading.insulation, float | int) or reading.insulation < 1:
        context = context.insulated(reading.insulation)
    b, draws = drawn.t.shape

    def rows(x: Array) -> Array:
        return x.reshape(b * draws, *x.shape[2:])

    t = rows(drawn.t)
    if drawn.prefix is not None:
        t = jnp.where(in_prefix(rows(drawn.prefix), drawn.x_t.shape[2]), 1.0, t[:, None])
    given = Given.of(reading.batch).repeat(draws)
    prediction = reading.apply("denoise", context, given, rows(drawn.x_t), t)
    error = reading.process.loss(prediction, rows(drawn.target)).reshape(drawn.x_t.shape)
    return jnp.where(learned(reading.batch, reading.config, drawn), error, 0)


def in_prefix(prefix: Int[Array, "*b"], horizon: int) -> Bool[Array, "*b k"]:
    """Which actions of a chunk belong to its clean prefix."""
    return jnp.arange(horizon) < prefix[..., None]


def scored(batch: Batch, config: ObjectiveConfig) -> Bool[Array, "b k a"]:
    """Which elements of a chunk have a loss: the valid ones, with `padding_loss` all dims of valid steps."""
    valid = _valid(batch)
    return jnp.broadcast_to(valid.any(axis=-1, keepdims=True), valid.shape) if config.padding_loss else valid


def learned(batch: Batch, config: ObjectiveConfig, drawn: ActionDraws) -> Bool[Array, "b #draws k a"]:
    """The same for each draw: none in its clean prefix."""
    mask = scored(batch, config)[:, None]
    if drawn.prefix is None:
        return mask
    return mask & ~in_prefix(drawn.prefix, mask.shape[2])[..., None]


def _valid(batch: Batch) -> Bool[Array, "b k a"]:
    """The mask of the actions, which every batch with actions has."""
    if batch.action_mask is None:
        raise ValueError("the batch has actions, but no action_mask; say which of their elements are valid")
    return batch.action_mask


def _members(t: Float[Array, "b draws"], bins: int) -> Float[Array, "b draws bins"]:
    """One-hot: the bin that each t falls into, of `bins` equal ones over [0, 1]."""
    return jax.nn.one_hot(jnp.clip((t * bins).astype(jnp.int32), 0, bins - 1), bins)
