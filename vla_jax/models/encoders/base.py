"""What every image encoder has: a configuration, and a module from pictures to tokens.

A new encoder is one file with both, and one line in `ENCODERS`.
"""

import dataclasses

import flax.linen as nn

from vla_jax.models.compute import Compute


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """What backbones ask of an encoder's configuration; `kind` is its name in `ENCODERS`."""

    kind: str = ""
    image_size: int = 64
    """Height and width of every camera's image in pixels."""

    @property
    def tokens(self) -> int:
        """Tokens per camera."""
        raise NotImplementedError

    def check(self, compute: Compute) -> None:
        """Raises ValueError where it cannot be computed so."""

    def make(self, out_width: int, compute: Compute) -> nn.Module:
        """The module: uint8 images [b h w 3] → tokens [b p out_width]."""
        raise NotImplementedError
