"""PaliGemma (arXiv:2407.07726): SigLIP tokens in front of Gemma's text, prefix-LM attention.

Parameters: `img/…` and `llm/…`, named and shaped as in the public checkpoints.
"""

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.layers.attention import prefix_lm, token_positions
from vla_jax.layers.axes import constrain
from vla_jax.models.backbones.base import BackboneConfig, Heads
from vla_jax.models.compute import Compute, check_heads
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.gemma import Gemma, TextConfig, TowerConfig
from vla_jax.types import Batch, Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig(BackboneConfig):
    """SigLIP and Gemma side by side."""

    kind: Literal["paligemma"] = "paligemma"
    """Which backbone; the others have options of their own."""
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()

    offers: ClassVar[frozenset[str]] = frozenset({"kv", "features"})
    tables: ClassVar[tuple[str, ...]] = ("llm/embedder/input_embedding",)
    sized_by: ClassVar[tuple[tuple[str, str], ...]] = (("llm/embedder/input_embedding", "text.vocab"),)
    has_text: ClassVar[bool] = True

    @property
    def image_size(self) -> int:
        """Height and width of every camera's image in pixels."""
        return self.vision.image_size

    @property
    def image_tokens(self) -> int:
        """Tokens of the prefix that one camera's image becomes: one per patch."""
        return self.vision.tokens

    @property
    def width(self) -> int:
        """Width of the decoder's outputs, to which image tokens are projected."""
        return self.text.width

    @property
    def heads(self) -> Heads:
        """Sizes of the decoder's keys and values, which a joint expert attends to layer by layer."""
        text = self.text
        return Heads(text.depth, text.heads, text.kv_heads, text.head_dim)

    @property
    def vocab(self) -> int:
        """Rows of the decoder's table."""
        return self.text.vocab

    def with_vocab(self, vocab: int) -> "PaliGemmaConfig":
        """The same with so many rows."""
        return dataclasses.replace(self, text=dataclasses.replace(self.text, vocab=vocab))

    def unknown(self) -> dict[str, int]:
        """The vocabulary may be left to the data set's tokenizer (0)."""
        return {"backbone.text.vocab": self.text.vocab}

    def check(self, compute: Compute) -> None:
        """cuDNN's flash attention has limits on the width of heads."""
        self.vision.check(compute)
        check_heads(compute, "model.backbone.text.head_dim", self.text.head_dim)

    def make(self, cameras: tuple[str, ...], compute: Compute, leaves: frozenset[str]) -> "PaliGemma":
        """The module for these cameras, whose contexts have the fields `leaves`."""
        return PaliGemma(self, cameras, compute, leaves)


class PaliGemma(nn.Module):
    """The backbone: reads images and text once, leaves a context, decodes text."""

    config: PaliGemmaConfig
    cameras: tuple[str, ...]
    compute: Compute
    leaves: frozenset[str] = frozenset({"kv"})
    """Fields of the context that are filled in."""

    def setup(self):
        """Declares encoder and decoder."""
        text, how = self.config.text, self.compute
        dtype = jnp.dtype(how.dtype)
        self.img = self.config.vision.make(text.width, how)
        tower = TowerConfig(
            width=text.width,
            depth=text.depth,
            mlp=text.mlp,
            heads=text.heads,
            kv_heads=text.kv_heads,
            head_dim=text.head_dim,
        )
        self.llm = Gemma(text.vocab, tower, dtype, how.remat, how.unroll, how.attention)

    def prefill(
        self, batch: Batch, plan_visible: Bool[Array, " b"] | None = None
    ) -> tuple[Context, Float[Array, "b l d"]]:
        """Reads `[cameras][text]` and returns the context and the outputs at the text positions.

        `plan_visible` says for which samples an expert may see the text target (default: none).
        Images and prompt see each other; target tokens see everything before them (§3.1).
        """
        tokens, mask = self._embed(batch)
        images = tokens.shape[1] - batch.tokens.shape[1]
        causal = jnp.concatenate([jnp.zeros_like(mask[:, :images]), batch.token_causal], axis=1)
        positions = token_positions(mask)
        hidden, kv = self.llm(tokens, positions, prefix_lm(mask, causal))
        visible = mask & ~causal
        if plan_visible is not None:
            visible = visible | (mask & plan_visible[:, None])
        context = Context(
            kv=kv if "kv" in self.leaves else None,
            features=hidden if "features" in self.leaves else None,
            mask=mask,
            visible=visible,
            positions=positions,
        )
        return context, hidden[:, images:]

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Float32 logits of the token that follows."""
        return self.llm.logits(hidden)

    def output_table(self) -> Float[Array, "v d"]:
        """What outputs are multiplied with for `logits`."""
        return self.llm.output_table()

    def decode(
        self, context: Context, token: Int[Array, " b"], slot: Int[Array, ""], *, visible: bool = True
    ) -> tuple[Float[Array, "b v"], Context]:
        """Appends one text token per sample and predicts the next.

        Its keys and values go into place `slot` of the context, which must have been reserved beforehand
        (`Context.reserve`). `visible` says whether an expert may see it later.
        """
        x = self.llm.embed(token[:, None])
        # As in `token_positions`: the slots of padding and of masked cameras take no position.
        positions = jnp.sum(context.mask, axis=1, keepdims=True)
        own = jnp.ones((x.shape[0], 1, 1), bool)
        hidden, kv = self.llm(x, positions, own, context.kv, context.mask)
        return self.llm.logits(hidden[:, 0]), context.write(kv, hidden, positions, slot, visible=visible)

    def extend(
        self, context: Context, tokens: Int[Array, "b g"], mask: Bool[Array, "b g"]
    ) -> Float[Array, "b g d"]:
        """Outputs at further tokens: `decode` with all of them known, as in training.

        Each sees what an expert may see of the context and the tokens before it; the context stays as it is.
        """
        seen = jnp.sum(context.visible, axis=1, keepdims=True)
        causal = prefix_lm(mask, jnp.ones_like(mask))
        positions = seen + token_positions(mask)
        hidden, _ = self.llm(self.llm.embed(tokens), positions, causal, context.kv, context.visible)
        return hidden

    def _embed(self, batch: Batch) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        """Prefix tokens and their mask.

        There may be several texts per sample, all first ones, then all second ones: its images are encoded once.
        """
        encoded = self.encode_images(batch)
        present = jnp.stack([batch.image_mask[name] for name in self.cameras], axis=1)
        mask = jnp.repeat(present, encoded.shape[1] // len(self.cameras), axis=1)
        texts = batch.tokens.shape[0] // encoded.shape[0]
        if texts > 1:
            encoded, mask = jnp.tile(encoded, (texts, 1, 1)), jnp.tile(mask, (texts, 1))
        tokens = jnp.concatenate([encoded, self.llm.embed(batch.tokens)], axis=1)
        tokens = constrain(tokens, ("batch", "prefix", "act_embed"))
        return tokens, jnp.concatenate([mask, batch.token_mask], axis=1)

    def encode_images(self, batch: Batch) -> Float[Array, "b p d"]:
        """Tokens of all cameras' images, camera by camera, which go through the encoder as one batch.

        In it a sample's cameras are neighbours, so that each device encodes the images of its own samples. One camera
        after the other, the batch's split would fall elsewhere: every image would move, and every image token of the
        whole batch be gathered on every device.
        """
        images = jnp.stack([batch.images[name] for name in self.cameras], axis=1)  # b c h w 3
        encoded = self.img(images.reshape(-1, *images.shape[2:]))
        return encoded.reshape(images.shape[0], -1, encoded.shape[-1])
