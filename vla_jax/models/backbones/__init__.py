"""Backbones: what reads images and text, once. `base.py` says what one is."""

from vla_jax.models.backbones.base import BackboneConfig
from vla_jax.models.backbones.encoder import EncoderConfig
from vla_jax.models.backbones.paligemma import PaliGemmaConfig

BACKBONES: dict[str, type[BackboneConfig]] = {
    "encoder": EncoderConfig,
    "paligemma": PaliGemmaConfig,
}
"""By the name in `model.backbone.kind`."""
