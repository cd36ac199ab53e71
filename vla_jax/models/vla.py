"""The vision-language-action model: a backbone that runs once and an expert that sees it through the cache.

    model = VLA(config)
    params = model.init(key, batch, batch.actions, t)["params"]
    cache, hidden = model.apply({"params": params}, batch, method="prefill")
    velocity = model.apply({"params": params}, cache, batch.state, x_t, t, method="denoise")

Parameters: `backbone/img/…`, `backbone/llm/…`, `expert/…`. With `expert.kind="tokens"` there is no expert: the
decoder writes the chunk as tokens (`models.action_tokens.generate_actions`).
"""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from vla_jax.layers.attention import runs_on
from vla_jax.models.config import VLAConfig
from vla_jax.models.experts.joint import JointExpert
from vla_jax.models.paligemma import PaliGemma
from vla_jax.types import Batch, Cache


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
        unknown = [
            name
            for name, value in {
                "text.vocab": cfg.text.vocab,
                "expert.action_dim": cfg.expert.action_dim,
                "expert.state_dim": cfg.expert.state_dim,
                "cameras": cfg.cameras,
            }.items()
            if not value
        ]
        if unknown:
            raise ValueError(
                f"model.{unknown[0]} is not set; give it, or resolve the configuration against a data set"
            )
        self.backbone = PaliGemma(cfg)
        if cfg.expert.kind == "joint":
            self.expert = JointExpert(cfg)

    def prefill(
        self, batch: Batch, target_visible: Bool[Array, " b"] | None = None
    ) -> tuple[Cache, Float[Array, "b l d"]]:
        """Reads images and text: the cache, and the outputs at the text positions. See `PaliGemma.prefill`."""
        return self.backbone.prefill(batch, target_visible)

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Float32 logits of the token that follows each output."""
        return self.backbone.logits(hidden)

    def output_table(self) -> Float[Array, "v d"]:
        """What outputs are multiplied with for `logits`."""
        return self.backbone.output_table()

    def denoise(
        self,
        cache: Cache,
        state: Float[Array, "bk q"],
        x_t: Float[Array, "bk k a"],
        t: Float[Array, "bk"] | Float[Array, "bk k"],
        action_mask: Bool[Array, "bk k a"] | None = None,
    ) -> Float[Array, "bk k a"]:
        """The expert's prediction for noisy chunks at time t. See `JointExpert.denoise`."""
        if self.config.expert.kind == "tokens":
            raise ValueError("model.expert.kind=tokens has no expert to denoise with; it writes tokens")
        return self.expert.denoise(cache, state, x_t, t, action_mask)

    def decode(
        self, cache: Cache, token: Int[Array, " b"], slot: Int[Array, ""], *, visible: bool = True
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Appends one text token and predicts the next. See `PaliGemma.decode`."""
        return self.backbone.decode(cache, token, slot, visible=visible)

    def extend(
        self, cache: Cache, tokens: Int[Array, "b g"], mask: Bool[Array, "b g"]
    ) -> Float[Array, "b g d"]:
        """Outputs at known further tokens, which see what an expert sees. See `PaliGemma.extend`."""
        return self.backbone.extend(cache, tokens, mask)

    def __call__(
        self, batch: Batch, x_t: Float[Array, "b k a"], t: Float[Array, " b"]
    ) -> tuple[Float[Array, "b k a"] | None, Float[Array, "b l v"]]:
        """Prefill and denoise: the prediction (None without an expert) and the logits at every text position
        (for init and tests)."""
        cache, hidden = self.prefill(batch)
        if self.config.expert.kind == "tokens":
            return None, self.logits(hidden)
        return self.denoise(cache, batch.state, x_t, t, batch.action_mask), self.logits(hidden)
