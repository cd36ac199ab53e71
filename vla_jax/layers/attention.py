"""Attention: who may look at whom, and the weighted sum itself.

Three ways to compute the same sum (`model.attention`): `xla`, plain einsums, everywhere; `cudnn`, flash attention on
NVIDIA GPUs; `splash`, Pallas flash attention on TPUs. The kernels never write the logits to memory.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.layers import cudnn, splash

Backend = Literal["xla", "cudnn", "splash"]

MASKED = -2.3819763e38
"""The logit of a forbidden pair: finite, so that a row without any allowed key is uniform and not NaN."""

PLATFORMS = {"cudnn": ("gpu", "cuda"), "splash": ("tpu",)}
"""Where the kernels run."""

KERNELS = {"cudnn": cudnn.attend, "splash": splash.attend}


def runs_on(backend: Backend, platform: str) -> bool:
    """Whether devices of a platform (`jax.Device.platform`) have a kernel."""
    return platform in PLATFORMS.get(backend, (platform,))


def check_backend(backend: Backend, platform: str) -> None:
    """Raises ValueError where they have not."""
    if not runs_on(backend, platform):
        raise ValueError(
            f"model.attention={backend} runs on {PLATFORMS[backend][0]}, but the devices are {platform}; "
            "use model.attention=xla"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMask:
    """Tokens in consecutive blocks: each sees the valid tokens of its own block and of those before it.

    Because block numbers never fall along the sequence, what a query sees is "every valid key up to the end of my
    block", one number per query instead of a [t t] mask: this is what the kernels take.
    """

    block: Int[Array, "b t"]
    """Number of each token's block, never falling."""
    valid: Bool[Array, "b t"]

    def dense(self) -> Bool[Array, "b t t"]:
        """`mask[b, query, key]`. Invalid queries see nobody (in the kernels: somebody; nobody reads them)."""
        block, valid = self.block, self.valid
        return (block[:, None, :] <= block[:, :, None]) & valid[:, None, :] & valid[:, :, None]

    def reach(self) -> Int[Array, "b t"]:
        """Position of the last token of each token's block."""
        last = jnp.concatenate(
            [self.block[:, 1:] != self.block[:, :-1], jnp.ones_like(self.block[:, :1], bool)], axis=1
        )
        length = self.block.shape[1]
        ends = jnp.where(last, jnp.arange(length), length)
        return jax.lax.cummin(ends, axis=1, reverse=True)


def prefix_lm(valid: Bool[Array, "b t"], causal: Bool[Array, "b t"]) -> BlockMask:
    """Prefix-LM (Raffel et al. 2020, §3.2.1): tokens with `causal` False see their whole block; each True starts a
    block of its own that sees all blocks before it. Nobody sees an invalid token."""
    return BlockMask(block=jnp.cumsum(causal, axis=1), valid=valid)


def token_positions(valid: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of each token among the valid ones: padding consumes none."""
    return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)


def attend(
    q: Float[Array, "bk t n e"],
    k: Float[Array, "bk t m e"],
    v: Float[Array, "bk t m e"],
    mask: Bool[Array, "bk t t"] | BlockMask,
    past: tuple[Float[Array, "b s m e"], Float[Array, "b s m e"]] | None = None,
    past_mask: Bool[Array, "b s"] | None = None,
    *,
    backend: Backend = "xla",
    length: str = "length",
) -> Float[Array, "bk t n e"]:
    """Grouped-query attention over a shared past and the tokens themselves.

    Queries are unscaled; `mask` rules the tokens' own part. `past` holds keys and values of earlier tokens that
    every query may see where `past_mask` allows. Its batch may be smaller by a whole factor K: then rows i·K …
    i·K+K-1 share past i (K noise draws per backbone pass); XLA never copies it, the kernels do. Logits and softmax
    are float32. `length` is the logical name of the queries' axis.

    The kernels take a `BlockMask` only. A dense mask is for single decoded tokens, which leave a kernel nothing to
    gain: it is computed by XLA.
    """
    if not isinstance(mask, BlockMask):
        return _attend_xla(q, k, v, mask, past, past_mask)
    if backend == "xla":
        return _attend_xla(q, k, v, mask.dense(), past, past_mask)
    visible, reach = mask.valid, mask.reach()
    if past is not None:
        draws = q.shape[0] // past_mask.shape[0]
        past_mask = jnp.repeat(past_mask, draws, axis=0)
        k = jnp.concatenate([jnp.repeat(past[0], draws, axis=0), k], axis=1)
        v = jnp.concatenate([jnp.repeat(past[1], draws, axis=0), v], axis=1)
        visible = jnp.concatenate([past_mask, visible], axis=1)
        reach = reach + past_mask.shape[1]
    return KERNELS[backend](q, k, v, visible, reach, length=length)


def _attend_xla(q, k, v, mask, past, past_mask):
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
