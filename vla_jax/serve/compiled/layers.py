"""The transformer layers of the compiled network: pure functions over rewritten weights (`weights.py`).

Letters as in `vla_jax.types`; r = b·S rows of noisy chunks, S samples of each of b observations.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vla_jax.layers.attention import MASKED
from vla_jax.layers.norm import rms_normalize
from vla_jax.serve.compiled.quantize import multiply
from vla_jax.types import PyTree


class Heads(NamedTuple):
    """Numbers and width of attention heads."""

    n: int
    m: int
    e: int


class Past(NamedTuple):
    """Keys and values that all queries of a row may see where `mask` allows; None: everywhere."""

    k: Float[Array, "b s m e"]
    v: Float[Array, "b s m e"]
    mask: Bool[Array, "b s"] | None


class Rotation(NamedTuple):
    """Sine and cosine of each token's angles."""

    sin: Float[Array, "b t half"]
    cos: Float[Array, "b t half"]


def over_layers(
    block: Callable[[Array, PyTree, tuple[PyTree, ...]], tuple[Array, PyTree]],
    x: Array,
    layers: list[PyTree] | PyTree,
    *inputs: list[PyTree] | PyTree,
    unroll: int = 1,
) -> tuple[Array, list[PyTree] | PyTree]:
    """Runs a block over layers: a list of weights as a plain loop, stacked ones as a scan; outputs alike.

    Each of `inputs` has one entry per layer, as a list or stacked; `unroll` is the scan's.
    """
    if not isinstance(layers, list):
        depth = jax.tree.leaves(layers)[0].shape[0]
        return jax.lax.scan(
            lambda x, layer: block(x, *layer), x, (layers, inputs), unroll=max(1, min(unroll, depth))
        )
    outputs = []
    for number, weights in enumerate(layers):
        given = tuple(
            entry[number] if isinstance(entry, list) else jax.tree.map(lambda leaf: leaf[number], entry)
            for entry in inputs
        )
        x, out = block(x, weights, given)
        outputs.append(out)
    return x, outputs


def rotation(positions: Int[Array, "b t"], width: int, max_wavelength: float = 10_000.0) -> Rotation:
    """Angles position · max_wavelength^(-2i/e), float32; see `vla_jax.layers.rope`."""
    half = width // 2
    frequency = max_wavelength ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return Rotation(jnp.sin(angle), jnp.cos(angle))


def rotate(x: Float[Array, "b t n e"], by: Rotation) -> Float[Array, "b t n e"]:
    """Rotates the pairs (x[i], x[i + e/2]), in float32."""
    half = x.shape[-1] // 2
    sin, cos = by.sin[:, :, None], by.cos[:, :, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def project(
    x: Float[Array, "b t d"], weights: tuple[Array, ...], biases: tuple[Array, ...] | None = None
) -> Float[Array, "b t n_m_m e"]:
    """One product with each weight [d, heads, e]; the heads of all of them side by side."""
    outs = [multiply(x, w) for w in weights]
    if biases is not None:
        outs = [out + bias for out, bias in zip(outs, biases)]
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=2)


def attend(
    q: Float[Array, "r t n e"],
    pasts: Sequence[Past],
    own: tuple[Float[Array, "r t m e"], Float[Array, "r t m e"]],
    own_mask: Bool[Array, "#r t t"] | Bool[Array, "#r 1 t"] | None,
    *,
    late: bool,
) -> Float[Array, "r t n e"]:
    """Grouped-query attention over several pasts and the tokens themselves; queries are scaled already.

    A past's batch may be smaller than the rows by a whole factor: neighbouring rows then share it. With `late`
    the parts are exponentiated by themselves under a common maximum, and the sum of the weights divides the
    weighted values; without, they are concatenated and normalised first.
    """
    rows, length, heads, width = q.shape
    groups = own[0].shape[2]
    q = q.reshape(rows, length, groups, heads // groups, width).transpose(0, 2, 1, 3, 4)  # r m t g e
    parts = [*pasts, Past(*own, None)]
    logits = [_logits(q, past) for past in parts]  # r m t g s
    for number, past in enumerate(pasts):
        if past.mask is not None:
            seen = jnp.repeat(past.mask, rows // past.mask.shape[0], axis=0)
            logits[number] = jnp.where(seen[:, None, None, None], logits[number], MASKED)
    if own_mask is not None:
        logits[-1] = jnp.where(own_mask[:, None, :, None], logits[-1], MASKED)
    if late:
        largest = jnp.max(jnp.stack([jnp.max(part, axis=-1) for part in logits]), axis=0)
        weights = [jnp.exp(part - largest[..., None]) for part in logits]
        total = sum(jnp.sum(part, axis=-1) for part in weights)
    else:
        whole = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)
        ends = np.cumsum([part.shape[-1] for part in logits])[:-1]
        weights = jnp.split(whole, ends, axis=-1)
    out = sum(_weighted(part.astype(q.dtype), past) for part, past in zip(weights, parts))
    if late:
        out = (out.astype(jnp.float32) / total[..., None]).astype(q.dtype)
    return out.transpose(0, 2, 1, 3, 4).reshape(rows, length, heads, width)


def _logits(q: Float[Array, "r m t g e"], past: Past) -> Float[Array, "r m t g s"]:
    folded = _fold(q, past.k.shape[0])
    logits = jnp.einsum("bmxe,bsme->bmxs", folded, past.k, preferred_element_type=jnp.float32)
    return _unfold(logits, q.shape)


def _weighted(weights: Float[Array, "r m t g s"], past: Past) -> Float[Array, "r m t g e"]:
    folded = _fold(weights, past.v.shape[0])
    return _unfold(jnp.einsum("bmxs,bsme->bmxe", folded, past.v), weights.shape)


def _fold(x: Float[Array, "r m t g y"], shared: int) -> Float[Array, "b m x y"]:
    """Rows that share a past lie beside its queries: x = (S t g)."""
    rows, m, t, g, y = x.shape
    x = x.reshape(shared, rows // shared, m, t * g, y).transpose(0, 2, 1, 3, 4)
    return x.reshape(shared, m, -1, y)


def _unfold(x: Float[Array, "b m x y"], like: tuple[int, ...]) -> Float[Array, "r m t g y"]:
    shared, m, _, y = x.shape
    rows, _, t, g, _ = like
    x = x.reshape(shared, m, rows // shared, t * g, y).transpose(0, 2, 1, 3, 4)
    return x.reshape(rows, m, t, g, y)


def decoder_block(
    x: Float[Array, "r t d"],
    w: PyTree,
    heads: Heads,
    rotation_of: Callable[[], Rotation],
    pasts: Sequence[Past],
    own_mask: Bool[Array, "#r t t"] | Bool[Array, "#r 1 t"] | None,
    modulation: Float[Array, "2 3 #r #t d"] | None = None,
    *,
    late: bool,
    only_keys: bool = False,
) -> tuple[Float[Array, "r t d"], tuple[Array, Array]]:
    """A block of Gemma's kind and the tokens' own keys and values; `modulation` holds adaRMS's for both norms.

    With `only_keys` the weights end with the projections to keys and values, and x is returned as it came.
    """
    normed, gate = _norm(x, w["attn_norm"], None if modulation is None else modulation[0])
    h = project(normed, w["qkv"])
    n = 0 if only_keys else heads.n
    by = rotation_of()
    rotated = rotate(h[:, :, : n + heads.m], by)
    k, v = rotated[:, :, n:], h[:, :, n + heads.m :]
    if only_keys:
        return x, (k, v)
    q = rotated[:, :, :n] * w["q_scale"] if w["q_scale"] is not None else rotated[:, :, :n]
    out = attend(q.astype(x.dtype), pasts, (k, v), own_mask, late=late)
    out = multiply(out.reshape(*x.shape[:2], -1), w["out"])
    x = x + (out if gate is None else out * gate)
    normed, gate = _norm(x, w["ffw_norm"], None if modulation is None else modulation[1])
    out = feed_forward(normed, w)
    return x + (out if gate is None else out * gate), (k, v)


def feed_forward(x: Float[Array, "r t d"], w: PyTree) -> Float[Array, "r t d"]:
    """gelu_tanh(x·W0) ∘ (x·W1) · W; `up` holds W0 and W1 as one weight [d, 2, f] or as two [d, f]."""
    if len(w["up"]) == 1:
        h = multiply(x, w["up"][0])
        gate, up = h[..., 0, :], h[..., 1, :]
    else:
        gate, up = (multiply(x, weight) for weight in w["up"])
    return multiply(jax.nn.gelu(gate) * up, w["down"])


def encoder_block(
    x: Float[Array, "b p d"], w: PyTree, heads: int, *, late: bool
) -> tuple[Float[Array, "b p d"], None]:
    """A block of the image encoder, bidirectional."""
    h = project(layer_norm(x, w["norm0"]), w["qkv"], w["qkv_bias"])
    q, k, v = h[:, :, :heads], h[:, :, heads : 2 * heads], h[:, :, 2 * heads :]
    if w["q_scale"] is not None:
        q = (q * w["q_scale"]).astype(x.dtype)
    out = attend(q, (), (k, v), None, late=late)
    x = x + multiply(out.reshape(*x.shape[:2], -1), w["out"]) + w["out_bias"]
    hidden = jax.nn.gelu(multiply(layer_norm(x, w["norm1"]), w["up"]) + w["up_bias"])
    return x + multiply(hidden, w["down"]) + w["down_bias"], None


def layer_norm(
    x: Float[Array, "b p d"], affine: dict[str, Array] | None, eps: float = 1e-6
) -> Float[Array, "b p d"]:
    """LayerNorm in float32; `affine` None: scale and bias are in what follows."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    wide = (wide - mean) * jax.lax.rsqrt(variance + eps)
    if affine is not None:
        wide = wide * affine["scale"] + affine["bias"]
    return wide.astype(x.dtype)


def _norm(
    x: Float[Array, "r t d"],
    scale: Float[Array, " d"] | None,
    modulation: Float[Array, "3 #r #t d"] | None,
) -> tuple[Float[Array, "r t d"], Any]:
    """RMSNorm with its scale (None: folded), or modulated; and the gate of the residual."""
    normed = rms_normalize(x)
    if modulation is not None:
        scale, shift, gate = modulation
        return (normed * (1 + scale) + shift).astype(x.dtype), gate.astype(x.dtype)
    return (normed if scale is None else normed * (1 + scale)).astype(x.dtype), None


def final_norm(
    x: Float[Array, "r t d"], scale: Float[Array, " d"] | None, modulation: Array | None
) -> Float[Array, "r t d"]:
    """The norm after the last block."""
    return _norm(x, scale, modulation)[0]
