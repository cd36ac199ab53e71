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
"""Backend → names of the platforms that have its kernel; `xla` is not in it, because it runs everywhere."""

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
    mask: Bool[Array, "bk t t"] | BlockMask | None,
    past: tuple[Float[Array, "b s m e"], Float[Array, "b s m e"]] | None = None,
    past_mask: Bool[Array, "b s"] | None = None,
    *,
    backend: Backend = "xla",
    length: str = "length",
) -> Float[Array, "bk t n e"]:
    """Grouped-query attention over a shared past and the tokens themselves.

    Queries are unscaled; `mask` rules the tokens' own part (None: all see all). `past` holds keys and values of earlier
    tokens that every query may see where `past_mask` allows. Its batch may be smaller by a whole factor K:
    then rows i·K … i·K+K-1 share past i (K noise draws per backbone pass); XLA never copies it, the kernels do. Logits
    and softmax are float32. `length` is the logical name of the queries' axis.

    The kernels take a `BlockMask` only. A dense mask is for single decoded tokens, which leave a kernel nothing to
    gain: it is computed by XLA.
    """
    if not isinstance(mask, BlockMask):
        return _attend_xla(q, k, v, mask, past, past_mask)
    if backend == "xla":
        return _attend_xla(q, k, v, mask.dense(), past, past_mask)
    visible, reach = mask.valid, mask.reach()
    if past is not None and past_mask is not None:
        draws = q.shape[0] // past_mask.shape[0]
        past_mask = jnp.repeat(past_mask, draws, axis=0)
        k = jnp.concatenate([jnp.repeat(past[0], draws, axis=0), k], axis=1)
        v = jnp.concatenate([jnp.repeat(past[1], draws, axis=0), v], axis=1)
        visible = jnp.concatenate([past_mask, visible], axis=1)
        reach = reach + past_mask.shape[1]
    return KERNELS[backend](q, k, v, visible, reach, length=length)


def attend_across(
    q: Float[Array, "bk t n e"],
    k: Float[Array, "b s m e"],
    v: Float[Array, "b s m e"],
    visible: Bool[Array, "b s"],
    *,
    backend: Backend = "xla",
) -> Float[Array, "bk t n e"]:
    """Cross-attention: unscaled queries to the `visible` keys of others, zero where there is none.

    As in `attend` rows i·K … i·K+K-1 share keys i, which nobody copies: to their keys they are one longer row.
    """
    b, s = visible.shape
    rows = q.reshape(b, -1, *q.shape[2:])
    if backend == "xla":
        out = _attend_xla(rows, k, v, jnp.broadcast_to(visible[:, None], (b, rows.shape[1], s)), None, None)
    else:
        out = KERNELS[backend](rows, k, v, visible, jnp.full(rows.shape[:2], s - 1))
    return jnp.where(visible.any(axis=1)[:, None, None, None], out, 0).reshape(q.shape)


def _attend_xla(q, k, v, mask, past, past_mask):
    """Past and own tokens are never concatenated: both are exponentiated under a common maximum, and the sum of all
    weights divides the weighted values, which are narrower than the weights."""
    rows, length, heads, width = q.shape
    groups, shared = k.shape[2], rows if past is None else past[0].shape[0]

    def by_past(x: Array) -> Array:
        return x.reshape(shared, rows // shared, *x.shape[1:])  # b k …

    q = by_past((q * width**-0.5).reshape(rows, length, groups, heads // groups, width))  # b k t m g e
    # Axes of every product in the order in which XLA makes them, so that the logits are never transposed.
    logits = jnp.einsum("bktmge,bksme->bkmtgs", q, by_past(k), preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(by_past(mask)[:, :, None, :, None], logits, MASKED)
    if past is None:
        weights, total = _exponentials(logits, jnp.max(logits, axis=-1))
        out = jnp.einsum("bkmtgs,bksme->bkmtge", weights.astype(v.dtype), by_past(v))
    else:
        keys, values = past
        before = jnp.einsum("bktmge,bsme->bmktgs", q, keys, preferred_element_type=jnp.float32)
        before = jnp.where(past_mask[:, None, None, None, None], before, MASKED)
        largest = jnp.maximum(jnp.max(logits, axis=-1), jnp.max(before, axis=-1).swapaxes(1, 2))
        weights, total = _exponentials(logits, largest)
        weights_before, total_before = _exponentials(before, largest.swapaxes(1, 2))
        out = jnp.einsum("bkmtgs,bksme->bkmtge", weights.astype(v.dtype), by_past(v))
        out_before = jnp.einsum("bmktgs,bsme->bmktge", weights_before.astype(v.dtype), values)
        out, total = out + out_before.swapaxes(1, 2), total + total_before.swapaxes(1, 2)
    out = (out.astype(jnp.float32) / total[..., None]).astype(v.dtype)
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(rows, length, heads, width)


def _exponentials(logits: Float[Array, "*b s"], largest: Float[Array, "*b"]) -> tuple[Array, Array]:
    """exp(logits - largest) and its sum; the maximum is no part of the softmax's value, so of its gradient neither."""
    weights = jnp.exp(logits - jax.lax.stop_gradient(largest)[..., None])
    return weights, jnp.sum(weights, axis=-1)
