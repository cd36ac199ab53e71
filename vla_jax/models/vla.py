"""The vision-language-action model: a backbone that runs once and an expert that sees it through its context.

    model = VLA(config)
    params = model.init(key, batch, batch.actions, t)["params"]
    context, hidden = model.apply({"params": params}, batch, method="prefill")
    velocity = model.apply({"params": params}, context, Given.of(batch), x_t, t, method="denoise")

Parameters: `backbone/…` and `expert/…`. With `expert.kind="tokens"` there is no expert: the
decoder writes the chunk as tokens (`models.action_tokens.generate_actions`).
"""

import dataclasses
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from vla_jax.layers.attention import runs_on
from vla_jax.models.config import VLAConfig
from vla_jax.types import Batch, Context, Given


def portable(config: VLAConfig, platform: str) -> VLAConfig:
    """The same model where attention's kernel may not exist: there XLA computes the same sum."""
    if runs_on(config.attention, platform):
        return config
    return dataclasses.replace(config, attention="xla")


class VLA(nn.Module):
    """Backbone and expert over one parameter tree."""

    config: VLAConfig

    def setup(self):
        """Declares the two parts; sizes that were left to the data set must be known by now."""
        cfg = self.config
        unknown = [name for name, value in cfg.unknown().items() if not value]
        if unknown:
            raise ValueError(
                f"model.{unknown[0]} is not set; give it, or resolve the configuration against a data set"
            )
        self.backbone = cfg.backbone.make(cfg.cameras, cfg.compute, cfg.leaves)
        if cfg.expert.is_network:
            self.expert = cfg.expert.make(cfg.backbone, cfg.compute)

    def prefill(
        self, batch: Batch, plan_visible: Bool[Array, " b"] | None = None
    ) -> tuple[Context, Float[Array, "b l d"] | None]:
        """Reads images and text: the context, and the outputs at the text positions. See `Backbone.prefill`."""
        return self.backbone.prefill(batch, plan_visible)

    def encode_images(self, batch: Batch) -> Float[Array, "b p d"]:
        """Image tokens alone, the first part of `prefill`: to be timed by itself."""
        return self.backbone.encode_images(batch)

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Float32 logits of the token that follows each output."""
        return self.backbone.logits(hidden)

    def output_table(self) -> Float[Array, "v d"]:
        """What outputs are multiplied with for `logits`."""
        return self.backbone.output_table()

    def prepare(self, context: Context, given: Given) -> tuple[Context, Given]:
        """The same for `denoise`, with what all its evaluations have in common computed. See `Expert.prepare`."""
        self._check_expert()
        return self.expert.prepare(context, given)

    def condition(self, t: Float[Array, "r"] | Float[Array, "r k"]) -> Any:
        """All that depends on t alone: what `denoise` takes in its place. See `Expert.condition`."""
        self._check_expert()
        return self.expert.condition(t)

    def denoise(
        self, context: Context, given: Given, x_t: Float[Array, "r k a"], t: Any
    ) -> Float[Array, "r k a"]:
        """The expert's prediction for noisy chunks at times t, [r] or [r k]. See `Expert.denoise`."""
        self._check_expert()
        return self.expert.denoise(context, given, x_t, t)

    def decode(
        self, context: Context, token: Int[Array, " b"], slot: Int[Array, ""], *, visible: bool = True
    ) -> tuple[Float[Array, "b v"], Context]:
        """Appends one text token and predicts the next. See `PaliGemma.decode`."""
        return self.backbone.decode(context, token, slot, visible=visible)

    def extend(
        self, context: Context, tokens: Int[Array, "b g"], mask: Bool[Array, "b g"]
    ) -> Float[Array, "b g d"]:
        """Outputs at known further tokens, which see what an expert sees. See `PaliGemma.extend`."""
        return self.backbone.extend(context, tokens, mask)

    def __call__(
        self, batch: Batch, x_t: Float[Array, "b k a"] | None, t: Float[Array, " b"]
    ) -> tuple[Float[Array, "b k a"] | None, Float[Array, "b l v"] | None]:
        """Prefill and denoise: the prediction (None without an expert) and the logits at every text position (None
        without a language model), for init and tests. `x_t` may be None without an expert."""
        context, hidden = self.prefill(batch)
        logits = None if hidden is None else self.logits(hidden)
        if not self.config.expert.is_network:
            return None, logits
        if x_t is None:
            raise ValueError(f"model.expert.kind={self.config.expert.kind} needs a noisy chunk; give x_t")
        return self.denoise(context, Given.of(batch), x_t, t), logits

    def _check_expert(self) -> None:
        if not self.config.expert.is_network:
            kind = self.config.expert.kind
            raise ValueError(f"model.expert.kind={kind} has no expert to denoise with; it writes tokens")
