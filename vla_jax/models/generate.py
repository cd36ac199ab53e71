"""Text decoding over the cache: greedy or by temperature, one jitted scan."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.models.vla import VLA
from vla_jax.types import Batch, Cache, PyTree


class Generated(NamedTuple):
    """Decoded text: tokens after the end are padding; the cache holds the text as a part of the prefix."""

    tokens: Int[Array, "b g"]
    mask: Bool[Array, "b g"]
    cache: Cache


def reserve(cache: Cache, slots: int) -> Cache:
    """Appends empty places for text that is yet to be decoded."""

    def pad(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, slots)
        return jnp.pad(x, widths)

    return cache.replace(
        keys=pad(cache.keys, 2),
        values=pad(cache.values, 2),
        mask=pad(cache.mask, 1),
        visible=pad(cache.visible, 1),
        positions=pad(cache.positions, 1),
    )


def generate(
    model: VLA,
    params: PyTree,
    batch: Batch,
    keys: PRNGKeyArray,
    *,
    max_tokens: int,
    eos: int,
    temperature: Float[Array, ""] | float = 0.0,
) -> Generated:
    """Decodes up to `max_tokens` tokens after the prompt, the end token included.

    The batch's own text targets, if it has any, are ignored. `keys` [b] has one key per row, so that what is drawn
    for one does not depend on the others. `temperature` 0 is greedy; it may be traced.
    """
    prompt = batch.replace(
        token_mask=batch.token_mask & ~batch.token_causal, token_causal=jnp.zeros_like(batch.token_causal)
    )
    cache, hidden = model.apply({"params": params}, prompt, method="prefill")
    last = jnp.sum(prompt.token_mask, axis=1) - 1
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    logits = model.apply({"params": params}, hidden, method="logits")
    start = cache.mask.shape[1]
    cache = reserve(cache, max_tokens)

    def step(carry, i):
        cache, logits, alive = carry
        token = _choose(jax.vmap(jax.random.fold_in, (0, None))(keys, i), logits, temperature)
        token = jnp.where(alive, token, 0)
        logits, grown = model.apply({"params": params}, cache, token, start + i, method="decode")
        # A sample that has ended keeps its places empty.
        grown = grown.replace(
            mask=grown.mask & (alive[:, None] | cache.mask),
            visible=grown.visible & (alive[:, None] | cache.visible),
        )
        return (grown, logits, alive & (token != eos)), (token, alive)

    alive = jnp.ones(last.shape, bool)
    (cache, _, _), (tokens, mask) = jax.lax.scan(step, (cache, logits, alive), jnp.arange(max_tokens))
    return Generated(tokens.T, mask.T, cache)


def _choose(
    keys: PRNGKeyArray, logits: Float[Array, "b v"], temperature: Float[Array, ""] | float
) -> Int[Array, " b"]:
    """The likeliest token of logits perturbed by temperature × Gumbel noise: a sample of softmax(logits / T)."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(logits + temperature * noise, axis=-1)
