"""The compiled network: images and prompt to a prefix, the state token into it, a noisy chunk to a prediction.

The same function as `VLA.prefill` and `VLA.denoise` on rewritten weights (`weights.py`), for one device or a mesh.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from vla_jax.layers.attention import prefix_lm, token_positions
from vla_jax.models.config import VLAConfig
from vla_jax.serve.compiled.conditioning import Condition, condition, suffix
from vla_jax.serve.compiled.config import Rewrites
from vla_jax.serve.compiled.layers import (
    Heads,
    Past,
    Rotation,
    decoder_block,
    encoder_block,
    final_norm,
    layer_norm,
    over_layers,
    rotation,
)
from vla_jax.serve.compiled.quantize import multiply
from vla_jax.types import PyTree

KeysValues = list[tuple[Array, Array]] | tuple[Array, Array]
"""Per layer, as a list or stacked."""


class Prefix(NamedTuple):
    """What the expert sees of a call, and how many positions that takes."""

    layers: KeysValues
    mask: Bool[Array, "b s"]
    seen: Int[Array, " b"]


@dataclasses.dataclass(frozen=True)
class Network:
    """Sizes and rewrites; no arrays."""

    model: VLAConfig
    rewrites: Rewrites
    dtype: str

    @property
    def heads(self) -> Heads:
        """Of both towers."""
        text = self.model.backbone.text
        return Heads(text.heads, text.kv_heads, text.head_dim)

    def encode(self, weights: PyTree, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b p d"]:
        """Image tokens. `weights` are those of vision."""
        cfg, dtype = self.model.backbone.vision, jnp.dtype(self.dtype)
        x = images.astype(jnp.float32)
        if not self.rewrites.norms:
            x = x / 127.5 - 1.0
        if self.rewrites.patches:
            side = cfg.image_size // cfg.patch
            x = x.reshape(-1, side, cfg.patch, side, cfg.patch, 3).transpose(0, 1, 3, 2, 4, 5)
            x = x.reshape(x.shape[0], side * side, -1) @ weights["patch"]
        else:
            x = jax.lax.conv_general_dilated(
                x, weights["patch"], (cfg.patch,) * 2, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ).reshape(x.shape[0], cfg.tokens, cfg.width)
        x = (x + weights["patch_bias"]).astype(dtype)
        late = self.rewrites.attention
        x, _ = over_layers(
            lambda x, w, _: encoder_block(x, w, cfg.heads, late=late),
            x,
            weights["layers"],
            unroll=self.model.unroll,
        )
        return multiply(layer_norm(x, weights["norm"]), weights["head"]) + weights["head_bias"]

    def embed(self, table: Float[Array, "v d"], tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Token embeddings, scaled by √d."""
        return table[tokens].astype(self.dtype) * jnp.asarray(self.model.backbone.text.width**0.5, self.dtype)

    def prefill(
        self,
        weights: PyTree,
        image_tokens: Float[Array, "b c p d"],
        present: Bool[Array, " c"],
        embedded: Float[Array, "b l d"],
        text_mask: Bool[Array, "b l"],
        causal: Bool[Array, "b l"] | None = None,
    ) -> Prefix:
        """Keys and values of images and text. `causal` marks a plan, which the expert then sees."""
        b, cameras, patches, _ = image_tokens.shape
        images = jnp.broadcast_to(jnp.repeat(present, patches), (b, cameras * patches))
        mask = jnp.concatenate([images, text_mask], axis=1)
        x = jnp.concatenate([image_tokens.reshape(b, -1, image_tokens.shape[-1]), embedded], axis=1)
        if causal is None:
            sees = mask[:, None]  # nobody reads what an invalid token has seen
        else:
            sees = prefix_lm(mask, jnp.concatenate([jnp.zeros_like(images), causal], axis=1)).dense()
        positions = token_positions(mask)
        block = self._block(positions, sees)
        x, layers = over_layers(
            lambda x, w, _: block(x, w, (), None), x, weights["layers"], unroll=self.model.unroll
        )
        if self.rewrites.last_layer:
            _, last = block(x, weights["last"], (), None, only_keys=True)
            layers = [*layers, last] if isinstance(layers, list) else _append(layers, last)
        return Prefix(layers, mask, jnp.sum(mask, axis=1))

    def add_state(self, weights: PyTree, prefix: Prefix, state: Float[Array, "b q"]) -> Prefix:
        """The state token's keys and values behind the prefix. It sees the prefix and itself, and is clean data."""
        x = (state @ weights["state"]["kernel"] + weights["state"]["bias"])[:, None].astype(self.dtype)
        clean = self._clean(weights)
        past_mask = prefix.mask

        block = self._block(prefix.seen[:, None], None)
        inputs = (prefix.layers,) if clean.layers is None else (prefix.layers, clean.layers)
        _, own = over_layers(
            lambda x, w, given: block(x, w, (Past(*given[0], past_mask),), given[1:]),
            x,
            weights["layers"],
            *inputs,
            unroll=self.model.unroll,
        )
        layers = jax.tree.map(lambda past, token: jnp.concatenate([past, token], axis=-3), prefix.layers, own)
        mask = jnp.concatenate([prefix.mask, jnp.ones_like(prefix.mask[:, :1])], axis=1)
        return Prefix(layers, mask, prefix.seen + 1)

    def denoise(
        self,
        weights: PyTree,
        prefix: Prefix,
        x_t: Float[Array, "r k a"],
        at: Condition,
        out: PyTree,
        state: Float[Array, "b q"] | None = None,
    ) -> Float[Array, "r k a"]:
        """The prediction, float32. `out`: the last projection (it may carry a factor); `state` where the prefix
        does not hold it yet."""
        rows, horizon, _ = x_t.shape
        x = x_t @ weights["action_in"]["kernel"]
        if "bias" in weights["action_in"]:
            x = x + weights["action_in"]["bias"]
        if at.bias is not None:
            if not self.rewrites.projections:
                x = x @ weights["mix_actions"]
            x = jax.nn.swish(x + at.bias) @ weights["mix_out"]["kernel"] + weights["mix_out"]["bias"]
        mask = None
        if state is not None:
            token = state @ weights["state"]["kernel"] + weights["state"]["bias"]
            x = jnp.concatenate([jnp.repeat(token, rows // token.shape[0], axis=0)[:, None], x], axis=1)
            sees = jnp.arange(horizon + 1)
            mask = ((sees[:, None] > 0) | (sees[None] == 0))[None]
            at = suffix(at, self._clean(weights), horizon)
        x = x.astype(self.dtype)
        seen = jnp.repeat(prefix.seen, rows // prefix.seen.shape[0])
        block = self._block(seen[:, None] + jnp.arange(x.shape[1]), mask)
        inputs = (prefix.layers,) if at.layers is None else (prefix.layers, at.layers)
        x, _ = over_layers(
            lambda x, w, given: block(x, w, (Past(*given[0], prefix.mask),), given[1:]),
            x,
            weights["layers"],
            *inputs,
            unroll=self.model.unroll,
        )
        x = final_norm(x[:, -horizon:], weights["final_norm"], _tail(at.final, horizon))
        return x.astype(jnp.float32) @ out["kernel"] + out["bias"]

    def _clean(self, weights: PyTree) -> Condition:
        """The conditioning of clean data."""
        if self.model.expert.time == "mlp":
            return Condition()
        return condition(weights, self.model, jnp.ones((1, 1)))

    def _block(self, positions: Int[Array, "r t"], own_mask: Bool[Array, "#r #t t"] | None):
        """A decoder block for tokens at these positions."""
        heads, late = self.heads, self.rewrites.attention
        once = rotation(positions, heads.e) if self.rewrites.rope else None

        def rotation_of() -> Rotation:
            return rotation(positions, heads.e) if once is None else once

        def block(x, weights, pasts, modulation, *, only_keys=False):
            return decoder_block(
                x,
                weights,
                heads,
                rotation_of,
                pasts,
                own_mask,
                modulation[0] if modulation else None,
                late=late,
                only_keys=only_keys,
            )

        return block


def _append(stacked: KeysValues, last: tuple[Array, Array]) -> KeysValues:
    return jax.tree.map(lambda rest, end: jnp.concatenate([rest, end[None]]), stacked, last)


def _tail(final: Float[Array, "3 #r #t d"] | None, horizon: int) -> Float[Array, "3 #r #t d"] | None:
    """The actions' part of a modulation that may have a state token in front."""
    return final if final is None or final.shape[-2] == 1 else final[:, :, -horizon:]
