"""Text decoding over the context: greedy or by temperature, one jitted scan."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vla_jax.models.vla import VLA
from vla_jax.types import Batch, Context, PyTree


class Generated(NamedTuple):
    """Decoded text: tokens after the end are padding; the context holds the text as a part of the prefix."""

    tokens: Int[Array, "b g"]
    mask: Bool[Array, "b g"]
    context: Context


def generate(
    model: VLA,
    params: PyTree,
    batch: Batch,
    keys: Key[Array, " b"],
    *,
    max_tokens: int,
    eos: int,
    temperature: Float[Array, ""] | float = 0.0,
) -> Generated:
    """Decodes up to `max_tokens` tokens after the prompt, the end token included.

    The batch's own text targets, if it has any, are ignored. `keys` [b] has one key per row, so that what is drawn
    for one does not depend on the others. `temperature` 0 is greedy; it may be traced.
    """

    def apply(method: str, *args: Any) -> Any:
        return model.apply({"params": params}, *args, method=method)

    prompt = batch.replace(
        token_mask=batch.token_mask & ~batch.token_causal, token_causal=jnp.zeros_like(batch.token_causal)
    )
    context, hidden = apply("prefill", prompt)
    last = jnp.sum(prompt.token_mask, axis=1) - 1
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    logits = apply("logits", hidden)
    start = context.mask.shape[1]
    context = context.reserve(max_tokens)

    def step(carry, i):
        context, logits, alive = carry
        token = _choose(jax.vmap(jax.random.fold_in, (0, None))(keys, i), logits, temperature)
        token = jnp.where(alive, token, 0)
        logits, grown = apply("decode", context, token, start + i)
        # A sample that has ended keeps its places empty.
        grown = grown.replace(
            mask=grown.mask & (alive[:, None] | context.mask),
            visible=grown.visible & (alive[:, None] | context.visible),
        )
        return (grown, logits, alive & (token != eos)), (token, alive)

    alive = jnp.ones(last.shape, bool)
    (context, _, _), (tokens, mask) = jax.lax.scan(step, (context, logits, alive), jnp.arange(max_tokens))
    return Generated(tokens.T, mask.T, context)


def _choose(
    keys: Key[Array, " b"], logits: Float[Array, "b v"], temperature: Float[Array, ""] | float
) -> Int[Array, " b"]:
    """The likeliest token of logits perturbed by temperature × Gumbel noise: a sample of softmax(logits / T)."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(logits + temperature * noise, axis=-1)
