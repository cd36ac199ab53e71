"""Action chunks as tokens, written by the decoder over its context (FAST, arXiv:2501.09747).

A chunk is complete when its tokens stand for all of its k·a coefficients. The decoder may only choose among the
tokens that still fit, so that whatever the network says, what comes out is a chunk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vla_jax.models.vla import VLA
from vla_jax.types import Context, PyTree


class ActionGrammar(NamedTuple):
    """Which token ids make up chunks. A pytree of arrays: another tokenizer compiles nothing anew."""

    begin: Int[Array, " n"]
    """Given before the chunk's tokens; at least one."""
    end: Int[Array, ""]
    """The id that follows a chunk's last token."""
    coefficients: Int[Array, " v"]
    """How many coefficients an id stands for; 0: it is no action token."""
    total: Int[Array, ""]
    """Coefficients of a whole chunk; 0: tokens hold pieces of coefficients, so that only the end id ends a chunk."""


class GeneratedTokens(NamedTuple):
    """What was written: without begin and end; `mask` is False behind a chunk's last token."""

    tokens: Int[Array, "b g"]
    mask: Bool[Array, "b g"]


def generate_actions(
    model: VLA,
    params: PyTree,
    context: Context,
    grammar: ActionGrammar,
    keys: Key[Array, " b"],
    *,
    max_tokens: int,
    temperature: Float[Array, ""] | float = 0.0,
) -> GeneratedTokens:
    """Writes a chunk per row of the context: at most `max_tokens` tokens, over what an expert may see of it.

    `keys` [b] has one key per row. `temperature` 0 takes the likeliest token, 1 samples the model's distribution.
    Stops when every row is complete, so that short chunks cost less.
    """
    grammar = jax.tree.map(jnp.asarray, grammar)
    rows, start = context.mask.shape
    given = grammar.begin.shape[0]
    # The last token that is written is read by nobody, so it needs no place in the context.
    context = context.replace(mask=context.visible).reserve(given + max_tokens - 1)

    def decode(context: Context, token: Int[Array, " b"], slot: Int[Array, ""]) -> Any:
        return model.apply({"params": params}, context, token, slot, method="decode")

    def read(context, inputs):
        token, slot = inputs
        _, context = decode(context, jnp.full((rows,), token), slot)
        return context, None

    context, _ = jax.lax.scan(read, context, (grammar.begin[:-1], start + jnp.arange(given - 1)))

    def write(carry):
        i, context, last, left, alive, tokens, mask = carry
        # Rows that are complete go on with what nobody reads.
        logits, context = decode(context, last, start + given - 1 + i)
        token = _choose(jax.vmap(jax.random.fold_in, (0, None))(keys, i), logits, left, grammar, temperature)
        written = alive & ((grammar.total > 0) | (token != grammar.end))
        tokens = tokens.at[:, i].set(jnp.where(written, token, 0))
        mask = mask.at[:, i].set(written)
        left = left - jnp.where(written, grammar.coefficients[token], 0)
        alive = written & ((grammar.total == 0) | (left > 0))
        return i + 1, context, token, left, alive, tokens, mask

    def unfinished(carry):
        i, _, _, _, alive, _, _ = carry
        return (i < max_tokens) & jnp.any(alive)

    nothing = jnp.zeros((rows, max_tokens), jnp.int32)
    first = (
        jnp.zeros((), jnp.int32),
        context,
        jnp.full((rows,), grammar.begin[-1]),
        jnp.full((rows,), grammar.total),
        jnp.ones((rows,), bool),
        nothing,
        nothing.astype(bool),
    )
    *_, tokens, mask = jax.lax.while_loop(unfinished, write, first)
    return GeneratedTokens(tokens, mask)


def _choose(
    keys: Key[Array, " b"],
    logits: Float[Array, "b v"],
    left: Int[Array, " b"],
    grammar: ActionGrammar,
    temperature: Float[Array, ""] | float,
) -> Int[Array, " b"]:
    """The likeliest permitted token of logits + temperature × Gumbel noise: a sample of their softmax."""
    fits = (grammar.coefficients > 0)[None] & (grammar.coefficients[None] <= left[:, None])
    pieces = (grammar.coefficients > 0) | (jnp.arange(logits.shape[1]) == grammar.end)
    allowed = jnp.where(grammar.total > 0, fits, pieces[None])
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(jnp.where(allowed, logits + temperature * noise, -jnp.inf), axis=-1).astype(jnp.int32)
