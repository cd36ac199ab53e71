"""Gemma's transformer (arXiv:2403.08295): the decoder of the backbone and, with other sizes, the action expert.

Parameter names and shapes are those of the public checkpoints, layers stacked in front: `q_einsum/w
[layers n d e]`, `kv_einsum/w [layers 2 m d e]`, `attn_vec_einsum/w [layers n e d]`, `mlp/gating_einsum
[layers 2 d f]` (gate first), `mlp/linear [layers f d]`.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.layers import init
from vla_jax.layers.attention import Backend, BlockMask, attend
from vla_jax.layers.axes import constrain
from vla_jax.layers.linear import declare, multiply
from vla_jax.layers.mlp import GeGLU
from vla_jax.layers.norm import AdaRMSNorm, Modulation, RMSNorm
from vla_jax.layers.rope import Rotation, rotate, rotation
from vla_jax.models.stack import CONTEXT, INPUT, PROJECTED, declare_blocks, named, needed, run_blocks
from vla_jax.types import KeysValues


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The Gemma decoder that reads image tokens and text."""

    vocab: int = 0
    """Rows of the embedding; 0: as many as the data set's tokenizer has."""
    width: int = 128
    """Width of the residual stream."""
    depth: int = 3
    """Transformer blocks; the expert has as many."""
    mlp: int = 256
    """Width of the gated feed-forward layer."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 1
    """Key/value heads."""
    head_dim: int = 32
    """Width of a head."""

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"text.heads={self.heads} is not divisible by text.kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"text.head_dim={self.head_dim} is odd; rotary positions need an even one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Sizes of one tower of blocks."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    adaptive: bool = False


class BothNorms(NamedTuple):
    """What a condition does to the two norms of a block."""

    attention: Modulation
    ffw: Modulation


class Modulations(NamedTuple):
    """What a condition does to every norm of an adaptive tower."""

    layers: BothNorms
    """One entry per layer, stacked or a tuple."""
    final: Modulation


class Own(NamedTuple):
    """What one layer is given for itself."""

    past: KeysValues | None
    modulation: BothNorms | None


class Shared(NamedTuple):
    """What all layers are given."""

    rotation: Rotation | None = None
    mask: BlockMask | Bool[Array, "bk t t"] | None = None
    past_mask: Bool[Array, "b s"] | None = None
    condition: Float[Array, "#bk #t g"] | None = None


class Tower(nn.Module):
    """Stacked blocks and the last norm."""

    config: TowerConfig
    remat: str = "none"
    unroll: int = 1
    attention: Backend = "xla"
    length: str = "length"
    """Logical name of the axis of tokens."""

    def setup(self):
        """Declares the stack of blocks and the last norm, which is adaptive where the blocks' norms are."""
        cfg = self.config
        arguments = (cfg, self.attention, self.length)
        self.layers = declare_blocks(
            self, "layers", Block, arguments,
            depth=cfg.depth, remat=self.remat, unroll=self.unroll, methods=("__call__", "modulation"),
        )  # fmt: skip
        self.final_norm = AdaRMSNorm(cfg.width) if cfg.adaptive else RMSNorm()

    def modulations(self, condition: Float[Array, "#bk #t g"]) -> Modulations:
        """What a condition does to all norms of an adaptive tower, for `__call__` in its place. Axes of 1 stay 1."""
        _, layers = run_blocks(self.layers, None, None, Shared(condition=condition), method="modulation")
        return Modulations(layers, self.final_norm.modulation(condition))

    def __call__(
        self,
        x: Float[Array, "bk t d"],
        positions: Int[Array, "bk t"],
        mask: BlockMask | Bool[Array, "bk t t"],
        past: KeysValues | None = None,
        past_mask: Bool[Array, "b s"] | None = None,
        condition: Float[Array, "#bk #t g"] | Modulations | None = None,
    ) -> tuple[Float[Array, "bk t d"], KeysValues]:
        """Runs tokens that see each other by `mask` and an earlier `past` by `past_mask`.

        Returns the normalised output and the tokens' own keys and values per layer. `condition` modulates the
        norms of an adaptive tower.
        """
        if self.attention == "xla" and isinstance(mask, BlockMask):
            mask = mask.dense()  # once, not in every layer
        ready = isinstance(condition, Modulations)
        shared = Shared(
            rotation=rotation(positions, self.config.head_dim),
            mask=mask,
            past_mask=past_mask,
            condition=None if ready else condition,
        )
        own = Own(past, condition.layers if ready else None)
        x, keys_values = run_blocks(self.layers, x, own, shared)
        x, _ = _normed(self.final_norm, x, condition.final if ready else condition)
        return x, keys_values


class Block(nn.Module):
    """x + gate·attention(norm(x)), then x + gate·mlp(norm(x)); the gates are 1 unless the norms are adaptive."""

    config: TowerConfig
    attention: Backend
    length: str

    def setup(self):
        """Declares norms, attention and feed-forward layer."""
        cfg = self.config
        self.pre_attention_norm, self.pre_ffw_norm = (
            AdaRMSNorm(cfg.width) if cfg.adaptive else RMSNorm() for _ in range(2)
        )
        self.attn = Attention(cfg, self.attention)
        self.mlp = GeGLU(cfg.width, cfg.mlp)

    def __call__(
        self, x: Float[Array, "bk t d"], own: Own, shared: Shared
    ) -> tuple[Float[Array, "bk t d"], KeysValues]:
        """The tokens behind this layer, and the layer's keys and values; see `Tower.__call__`."""
        before, after = own.modulation or (shared.condition, shared.condition)
        # few tokens after a past: they stay together
        length = self.length if own.past is None else "length"
        x = named(x, INPUT)
        normed, gate = _normed(self.pre_attention_norm, x, before)
        out, keys_values = self.attn(normed, own.past, shared, length)
        x = x + (out if gate is None else out * gate)
        normed, gate = _normed(self.pre_ffw_norm, x, after)
        out = self.mlp(normed, length)
        x = x + (out if gate is None else out * gate)
        return constrain(x, ("batch", length, "act_embed")), keys_values

    def modulation(self, nothing: None, own: None, shared: Shared) -> tuple[None, BothNorms]:
        """What a condition does to both norms."""
        del own
        condition = needed(shared.condition, "a condition")
        return nothing, BothNorms(
            self.pre_attention_norm.modulation(condition), self.pre_ffw_norm.modulation(condition)
        )


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: TowerConfig
    backend: Backend

    @nn.compact
    def __call__(
        self, x: Float[Array, "bk t d"], past: KeysValues | None, shared: Shared, length: str
    ) -> tuple[Float[Array, "bk t d"], KeysValues]:
        """The layer's output and its own keys (rotated) and values [bk t m e]."""
        q = Einsum(
            "btd,nde->btne",
            ("heads", "embed", "head_dim"),
            1,
            self._shape(self.config.heads),
            name="q_einsum",
        )(x)
        kv = Einsum(
            "btd,cmde->btcme",
            (None, "kv_heads", "embed", "head_dim"),
            2,
            (2, *self._shape(self.config.kv_heads)),
            name="kv_einsum",
        )(x)
        by = needed(shared.rotation, "rotary positions")
        q = constrain(rotate(q, by), ("batch", length, "act_heads", None))
        q, k, v = (named(x, PROJECTED) for x in (q, rotate(kv[:, :, 0], by), kv[:, :, 1]))
        before = None if past is None else past.of_layer()
        out = attend(q, k, v, shared.mask, before, shared.past_mask, backend=self.backend, length=length)
        out = named(out, CONTEXT)
        out = Einsum(
            "btne,ned->btd",
            ("heads", "head_dim", "embed"),
            (0, 1),
            (self.config.heads, self.config.head_dim, self.config.width),
            name="attn_vec_einsum",
        )(out)
        return out, KeysValues(k, v)

    def _shape(self, heads: int) -> tuple[int, int, int]:
        return heads, self.config.width, self.config.head_dim


class Einsum(nn.Module):
    """A weight `w` and the einsum that applies it."""

    equation: str
    names: tuple[str | None, ...]
    in_axis: int | tuple[int, ...]
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the weight in the dtype of `x`."""
        contracted = (self.in_axis,) if isinstance(self.in_axis, int) else self.in_axis
        # Heads are outputs of the projection, not repetitions of it; only the leading axes before the
        # contracted one that name neither (the k/v pair) are batches of independent weights.
        batch = tuple(i for i, name in enumerate(self.names) if name is None and i not in contracted)
        w = declare(self, "w", init.fan_in(self.names, in_axis=self.in_axis, batch_axis=batch), self.shape)
        return multiply(self.equation, x, w)


class Embedder(nn.Module):
    """The token table, tied to the output: tokens in × √d, logits out in float32."""

    vocab: int
    width: int
    dtype: jnp.dtype

    def setup(self):
        """Declares the table [v d]."""
        self.input_embedding = self.param(
            "input_embedding", init.normal(("vocab", "embed"), self.width**-0.5), (self.vocab, self.width)
        )

    def encode(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Embeds tokens, scaled by √d.

        Every device looks up its own columns of the table, for all samples of its copy of the model; then samples are
        exchanged for columns. Without the first constraint the backward pass, for the same columns, would gather the
        gradients of all tokens, whole, on every device.
        """
        x = self.input_embedding[tokens].astype(self.dtype) * jnp.asarray(self.width**0.5, self.dtype)
        x = constrain(x, ("replica", "length", "embed"))
        return constrain(x, ("batch", "length", "act_embed"))

    def decode(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits of the next token, float32."""
        return jnp.einsum(
            "...d,vd->...v", x, self.input_embedding.astype(x.dtype), preferred_element_type=jnp.float32
        )


class Gemma(nn.Module):
    """The decoder: embedding, tower, tied logits."""

    vocab: int
    tower: TowerConfig
    dtype: jnp.dtype
    remat: str = "none"
    unroll: int = 1
    attention: Backend = "xla"

    def setup(self):
        """Declares the parts; the tower's parameters lie directly beside the embedder's."""
        self.embedder = Embedder(self.vocab, self.tower.width, self.dtype)
        self.blocks = Tower(self.tower, self.remat, self.unroll, attention=self.attention, length="prefix")
        nn.share_scope(self, self.blocks)

    def embed(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Token embeddings."""
        return self.embedder.encode(tokens)

    def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Float32 logits of normalised outputs."""
        return self.embedder.decode(x)

    def output_table(self) -> Float[Array, "v d"]:
        """The token table, which is tied to the output."""
        return self.embedder.input_embedding

    def __call__(self, x, positions, mask, past=None, past_mask=None):
        """See `Tower.__call__`."""
        return self.blocks(x, positions, mask, past, past_mask)


def _normed(
    norm: RMSNorm | AdaRMSNorm, x: Float[Array, "bk t d"], condition: Array | Modulation | None
) -> tuple[Float[Array, "bk t d"], Float[Array, "#bk #t d"] | None]:
    """The normalised x and, where the norm is adaptive, the gate of its residual."""
    if isinstance(norm, AdaRMSNorm):
        return norm(x, needed(condition, "a condition"))
    return norm(x), None
