"""Image encoders: pictures to tokens. `base.py` says what one is."""

from vla_jax.models.encoders.base import ImageEncoderConfig
from vla_jax.models.encoders.siglip import VisionConfig

ENCODERS: dict[str, type[ImageEncoderConfig]] = {
    "siglip": VisionConfig,
}
"""By the name in `kind`."""
