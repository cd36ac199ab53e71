"""PaliGemma (arXiv:2407.07726): SigLIP tokens in front of Gemma's text, prefix-LM attention.

Parameters: `img/…` and `llm/…`, named and shaped as in the public checkpoints.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.layers.attention import prefix_lm, token_positions
from vla_jax.layers.axes import constrain
from vla_jax.models.config import VLAConfig
from vla_jax.models.gemma import Gemma, TowerConfig
from vla_jax.models.siglip import SigLIP
from vla_jax.types import Batch, Cache


class PaliGemma(nn.Module):
    """The backbone: reads images and text once, leaves a cache, decodes text."""

    config: VLAConfig

    def setup(self):
        """Declares encoder and decoder."""
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        self.img = SigLIP(cfg.vision, cfg.text.width, dtype, cfg.remat, cfg.unroll, cfg.attention)
        tower = TowerConfig(
            width=cfg.text.width,
            depth=cfg.text.depth,
            mlp=cfg.text.mlp,
            heads=cfg.text.heads,
            kv_heads=cfg.text.kv_heads,
            head_dim=cfg.text.head_dim,
        )
        self.llm = Gemma(cfg.text.vocab, tower, dtype, cfg.remat, cfg.unroll, cfg.attention)

    def prefill(
        self, batch: Batch, target_visible: Bool[Array, " b"] | None = None
    ) -> tuple[Cache, Float[Array, "b l d"]]:
        """Reads `[cameras][text]` and returns the cache and the outputs at the text positions.

        `target_visible` says for which samples an expert may see the text target (default: none).
        Images and prompt see each other; target tokens see everything before them (§3.1).
        """
        tokens, mask = self._embed(batch)
        images = tokens.shape[1] - batch.tokens.shape[1]
        causal = jnp.concatenate([jnp.zeros_like(mask[:, :images]), batch.token_causal], axis=1)
        positions = token_positions(mask)
        hidden, (keys, values) = self.llm(tokens, positions, prefix_lm(mask, causal))
        visible = mask & ~causal
        if target_visible is not None:
            visible = visible | (mask & target_visible[:, None])
        cache = Cache(keys=keys, values=values, mask=mask, visible=visible, positions=positions)
        return cache, hidden[:, images:]

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Float32 logits of the token that follows."""
        return self.llm.logits(hidden)

    def output_table(self) -> Float[Array, "v d"]:
        """What outputs are multiplied with for `logits`."""
        return self.llm.output_table()

    def decode(
        self, cache: Cache, token: Int[Array, " b"], slot: Int[Array, ""], *, visible: bool = True
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Appends one text token per sample and predicts the next.

        Its keys and values go into place `slot` of the cache, which must have been reserved beforehand (see
        `models.generate.reserve`). `visible` says whether an expert may see it later.
        """
        x = self.llm.embed(token[:, None])
        positions = jnp.sum(cache.mask, axis=1, keepdims=True)
        own = jnp.ones((x.shape[0], 1, 1), bool)
        hidden, (k, v) = self.llm(x, positions, own, (cache.keys, cache.values), cache.mask)
        cache = cache.replace(
            keys=jax.lax.dynamic_update_slice_in_dim(cache.keys, k, slot, axis=2),
            values=jax.lax.dynamic_update_slice_in_dim(cache.values, v, slot, axis=2),
            mask=_set(cache.mask, slot, True),
            visible=_set(cache.visible, slot, visible),
            positions=jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, slot, axis=1),
        )
        return self.llm.logits(hidden[:, 0]), cache

    def extend(
        self, cache: Cache, tokens: Int[Array, "b g"], mask: Bool[Array, "b g"]
    ) -> Float[Array, "b g d"]:
        """Outputs at further tokens: `decode` with all of them known, as in training.

        Each sees what an expert may see of the cache and the tokens before it; the cache stays as it is.
        """
        seen = jnp.sum(cache.visible, axis=1, keepdims=True)
        causal = prefix_lm(mask, jnp.ones_like(mask))
        hidden, _ = self.llm(
            self.llm.embed(tokens),
            seen + token_positions(mask),
            causal,
            (cache.keys, cache.values),
            cache.visible,
        )
        return hidden

    def _embed(self, batch: Batch) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        """Prefix tokens and their mask. All cameras go through the encoder as one batch.

        In it a sample's cameras are neighbours, so that each device encodes the images of its own samples. One camera
        after the other, the batch's split would fall elsewhere: every image would move, and every image token of the
        whole batch be gathered on every device.
        """
        cameras = self.config.cameras
        b = batch.tokens.shape[0]
        images = jnp.stack([batch.images[name] for name in cameras], axis=1)  # b c h w 3
        encoded = self.img(images.reshape(-1, *images.shape[2:]))
        present = jnp.stack([batch.image_mask[name] for name in cameras], axis=1)
        mask = jnp.repeat(present, encoded.shape[1], axis=1)
        tokens = jnp.concatenate(
            [encoded.reshape(b, -1, encoded.shape[-1]), self.llm.embed(batch.tokens)], axis=1
        )
        tokens = constrain(tokens, ("batch", "prefix", "act_embed"))
        return tokens, jnp.concatenate([mask, batch.token_mask], axis=1)


def _set(mask: Bool[Array, "b s"], slot: Int[Array, ""], value: bool) -> Bool[Array, "b s"]:
    return jax.lax.dynamic_update_slice_in_dim(mask, jnp.full((mask.shape[0], 1), value), slot, axis=1)
