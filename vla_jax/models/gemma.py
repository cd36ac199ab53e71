"""Gemma's transformer (arXiv:2403.08295): the decoder of the backbone and, with other sizes, the action expert.

Parameter names and shapes are those of the public checkpoints, layers stacked in front: `q_einsum/w
[layers n d e]`, `kv_einsum/w [layers 2 m d e]`, `attn_vec_einsum/w [layers n e d]`, `mlp/gating_einsum
[layers 2 d f]` (gate first), `mlp/linear [layers f d]`.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.layers import init
from vla_jax.layers.attention import Backend, BlockMask, attend
from vla_jax.layers.axes import constrain
from vla_jax.layers.linear import declare, multiply
from vla_jax.layers.mlp import GeGLU
from vla_jax.layers.norm import AdaRMSNorm, RMSNorm
from vla_jax.layers.rope import apply_rope
from vla_jax.models.stack import CONTEXT, INPUT, PROJECTED, named, scan_blocks

KeysValues = tuple[Float[Array, "layers b t m e"], Float[Array, "layers b t m e"]]


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


class Tower(nn.Module):
    """Stacked blocks and the last norm."""

    config: TowerConfig
    dtype: jnp.dtype
    remat: str = "none"
    unroll: int = 1
    attention: Backend = "xla"
    length: str = "length"
    """Logical name of the axis of tokens."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "bk t d"],
        positions: Int[Array, "bk t"],
        mask: BlockMask | Bool[Array, "bk t t"],
        past: KeysValues | None = None,
        past_mask: Bool[Array, "b s"] | None = None,
        condition: Float[Array, "bk t_or_1 g"] | None = None,
    ) -> tuple[Float[Array, "bk t d"], KeysValues]:
        """Runs tokens that see each other by `mask` and an earlier `past` by `past_mask`.

        Returns the normalised output and the tokens' own keys and values per layer. `condition` modulates the
        norms of an adaptive tower.
        """
        length = self.length if past is None else "length"  # few tokens after a past: they stay together
        if self.attention == "xla" and isinstance(mask, BlockMask):
            mask = mask.dense()  # once, not in every layer
        blocks = scan_blocks(
            Block,
            depth=self.config.depth,
            remat=self.remat,
            unroll=self.unroll,
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
        )
        x, keys_values = blocks(self.config, self.dtype, self.attention, length, name="layers")(
            x, past, past_mask, positions, mask, condition
        )
        x, _ = _norm(self.config.adaptive, "final_norm", x, condition)
        return x, keys_values


class Block(nn.Module):
    """x + gate·attention(norm(x)), then x + gate·mlp(norm(x)); the gates are 1 unless the norms are adaptive."""

    config: TowerConfig
    dtype: jnp.dtype
    attention: Backend
    length: str

    @nn.compact
    def __call__(self, x, past, past_mask, positions, mask, condition):
        """One layer; see `Tower.__call__` for the shapes, without the layers axis."""
        x = named(x, INPUT)
        normed, gate = _norm(self.config.adaptive, "pre_attention_norm", x, condition)
        attention = Attention(self.config, self.attention, self.length, name="attn")
        out, keys_values = attention(normed, past, past_mask, positions, mask)
        x = x + (out if gate is None else out * gate)
        normed, gate = _norm(self.config.adaptive, "pre_ffw_norm", x, condition)
        out = GeGLU(self.config.width, self.config.mlp, self.length, name="mlp")(normed)
        x = x + (out if gate is None else out * gate)
        return constrain(x, ("batch", self.length, "act_embed")), keys_values


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: TowerConfig
    backend: Backend
    length: str

    @nn.compact
    def __call__(self, x, past, past_mask, positions, mask):
        """Returns [b t d] and this layer's own keys (rotated) and values [b t m e]."""
        q = Einsum(
            "btd,nde->btne",
            ("heads", "embed", "head_dim"),
            1,
            self._shape(self.config.heads),
            name="q_einsum",
        )(x)
        kv = Einsum(
            "btd,cmde->cbtme",
            (None, "kv_heads", "embed", "head_dim"),
            2,
            (2, *self._shape(self.config.kv_heads)),
            name="kv_einsum",
        )(x)
        q = constrain(apply_rope(q, positions), ("batch", self.length, "act_heads", None))
        q, k, v = named(q, PROJECTED), named(apply_rope(kv[0], positions), PROJECTED), named(kv[1], PROJECTED)
        out = attend(q, k, v, mask, past, past_mask, backend=self.backend, length=self.length)
        out = named(out, CONTEXT)
        out = Einsum(
            "btne,ned->btd",
            ("heads", "head_dim", "embed"),
            (0, 1),
            (self.config.heads, self.config.head_dim, self.config.width),
            name="attn_vec_einsum",
        )(out)
        return out, (k, v)

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
        options = dict(attention=self.attention, length="prefix")
        self.blocks = Tower(self.tower, self.dtype, self.remat, self.unroll, **options)
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


def _norm(adaptive: bool, name: str, x: Array, condition: Array | None) -> tuple[Array, Array | None]:
    """The block's norm and, where it is adaptive, the gate of its residual. Called within a compact method."""
    if adaptive:
        return AdaRMSNorm(name=name)(x, condition)
    return RMSNorm(name=name)(x), None
