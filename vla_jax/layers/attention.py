"""Attention: who may look at whom, and the weighted sum itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -2.3819763e38
"""The logit of a forbidden pair: finite, so that a row without any allowed key is uniform and not NaN."""


def prefix_lm_mask(valid: Bool[Array, "b t"], causal: Bool[Array, "b t"]) -> Bool[Array, "b t t"]:
    """Prefix-LM mask (Raffel et al. 2020, §3.2.1): `mask[b, query, key]`.

    Tokens with `causal` False see their whole block; each True starts a block of its own that sees all blocks
    before it. Nobody sees an invalid token.
    """
    block = jnp.cumsum(causal, axis=1)
    return (block[:, None, :] <= block[:, :, None]) & valid[:, None, :] & valid[:, :, None]


def token_positions(valid: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of each token among the valid ones: padding consumes none."""
    return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)


def attend(
    q: Float[Array, "bk t n e"],
    k: Float[Array, "bk t m e"],
    v: Float[Array, "bk t m e"],
    mask: Bool[Array, "bk t t"],
    past: tuple[Float[Array, "b s m e"], Float[Array, "b s m e"]] | None = None,
    past_mask: Bool[Array, "b s"] | None = None,
) -> Float[Array, "bk t n e"]:
    """Grouped-query attention over a shared past and the tokens themselves.

    Queries are unscaled; `mask[b, query, key]` rules the tokens' own part. `past` holds keys and values of
    earlier tokens that every query may see where `past_mask` allows. Its batch may be smaller by a whole
    factor K: then rows i·K … i·K+K-1 share past i, which is never copied (K noise draws per backbone pass).
    Logits and softmax are float32.
    """
    rows, length, heads, width = q.shape
    groups = k.shape[2]
    q = (q * width**-0.5).reshape(rows, length, groups, heads // groups, width)
    logits = jnp.einsum("btmge,bsme->bmgts", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits, MASKED)
    if past is None:
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = jnp.einsum("bmgts,bsme->btmge", weights, v)
        return out.reshape(rows, length, heads, width)

    keys, values = past
    shared = keys.shape[0]
    draws = rows // shared
    q_past = q.reshape(shared, draws * length, groups, heads // groups, width)
    past_logits = jnp.einsum("btmge,bsme->bmgts", q_past, keys, preferred_element_type=jnp.float32)
    past_logits = jnp.where(past_mask[:, None, None, None], past_logits, MASKED)
    past_logits = _to_rows(past_logits, draws, length)
    weights = jax.nn.softmax(jnp.concatenate([past_logits, logits], axis=-1), axis=-1).astype(v.dtype)
    past_weights, weights = weights[..., : keys.shape[1]], weights[..., keys.shape[1] :]
    out = jnp.einsum("bmgts,bsme->btmge", weights, v)
    past_out = jnp.einsum("bmgts,bsme->btmge", _from_rows(past_weights, draws, length), values)
    out = out + past_out.reshape(out.shape)
    return out.reshape(rows, length, heads, width)


def _to_rows(x: Array, draws: int, length: int) -> Array:
    """[b m g (K·t) s] → [b·K m g t s]."""
    b, m, g, _, s = x.shape
    return (
        x.reshape(b, m, g, draws, length, s).transpose(0, 3, 1, 2, 4, 5).reshape(b * draws, m, g, length, s)
    )


def _from_rows(x: Array, draws: int, length: int) -> Array:
    """[b·K m g t s] → [b m g (K·t) s]."""
    rows, m, g, _, s = x.shape
    b = rows // draws
    return (
        x.reshape(b, draws, m, g, length, s).transpose(0, 2, 3, 1, 4, 5).reshape(b, m, g, draws * length, s)
    )
