"""Images and state without a language model: what Diffusion Policy and other policies of one task read.

Tokens `[cameras][state]`: an image encoder's, whose weights all cameras share, each with an embedding of its camera.
"""

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.layers import init
from vla_jax.layers.attention import token_positions
from vla_jax.layers.axes import constrain
from vla_jax.layers.linear import dense
from vla_jax.models.backbones.base import BackboneConfig
from vla_jax.models.compute import Compute
from vla_jax.models.encoders.base import ImageEncoderConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.types import Batch, Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(BackboneConfig):
    """An image encoder, the state, or both."""

    kind: Literal["encoder"] = "encoder"
    """Which backbone; the others have options of their own."""
    vision: ImageEncoderConfig = VisionConfig()
    width: int = 128
    """Width of the features."""
    images: bool = True
    """Whether it looks at the cameras; False: at the state alone."""
    state_token: bool = False
    """Whether the robot's state is a token among the features. Experts may read it by themselves."""

    offers: ClassVar[frozenset[str]] = frozenset({"features"})

    def __post_init__(self):
        if not (self.images or self.state_token):
            raise ValueError(
                "model.backbone.images=False and model.backbone.state_token=False leave nothing to read; "
                "use model.backbone.state_token=True"
            )

    @property
    def reads_images(self) -> bool:
        """Whether it looks at the cameras: the option `images`."""
        return self.images

    @property
    def reads_state(self) -> bool:
        """Whether the state is a token among the features: the option `state_token`."""
        return self.state_token

    @property
    def image_size(self) -> int:
        """Height and width of every camera's image in pixels."""
        return self.vision.image_size

    @property
    def image_tokens(self) -> int:
        """Features that one camera's image becomes; 0 without images."""
        return self.vision.tokens if self.images else 0

    def check(self, compute: Compute) -> None:
        """Raises ValueError where the image encoder cannot be computed so."""
        self.vision.check(compute)

    def make(self, cameras: tuple[str, ...], compute: Compute, leaves: frozenset[str]) -> "Encoder":
        """The module for these cameras; its contexts have `features`."""
        del leaves  # it has but one thing to leave
        return Encoder(self, cameras, compute)


class Encoder(nn.Module):
    """Images and state to features."""

    config: EncoderConfig
    cameras: tuple[str, ...]
    compute: Compute

    def setup(self):
        """Declares encoder and embeddings."""
        cfg = self.config
        if cfg.images:
            self.img = cfg.vision.make(cfg.width, self.compute)
            start = init.normal(("embed",), 0.02)
            self.camera = [self.param(f"camera_{name}", start, (cfg.width,)) for name in self.cameras]
        if cfg.state_token:
            self.state_proj = dense(cfg.width, ("action", "embed"), jnp.dtype(self.compute.dtype))

    def prefill(self, batch: Batch, plan_visible: Bool[Array, " b"] | None = None) -> tuple[Context, None]:
        """The features of `[cameras][state]`. There is no text, so no plan either."""
        del plan_visible
        parts, masks = [], []
        if self.config.images:
            parts.append(self.encode_images(batch))
            present = jnp.stack([batch.image_mask[name] for name in self.cameras], axis=1)
            masks.append(jnp.repeat(present, self.config.image_tokens, axis=1))
        if self.config.state_token:
            parts.append(self.state_proj(batch.state)[:, None])
            masks.append(jnp.ones((batch.state.shape[0], 1), bool))
        features, mask = jnp.concatenate(parts, axis=1), jnp.concatenate(masks, axis=1)
        features = constrain(features, ("batch", "prefix", "act_embed"))
        return Context(features=features, mask=mask, visible=mask, positions=token_positions(mask)), None

    def encode_images(self, batch: Batch) -> Float[Array, "b p d"]:
        """Tokens of all cameras' images, camera by camera.

        A sample's cameras are neighbours, so that each device encodes the images of its own samples.
        """
        if not self.config.images:
            return jnp.zeros((batch.state.shape[0], 0, self.config.width), jnp.dtype(self.compute.dtype))
        images = jnp.stack([batch.images[name] for name in self.cameras], axis=1)  # b c h w 3
        tokens = self.img(images.reshape(-1, *images.shape[2:]))
        tokens = tokens.reshape(*images.shape[:2], *tokens.shape[1:])  # b c p d
        tokens = tokens + jnp.stack(self.camera)[:, None].astype(tokens.dtype)
        return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
