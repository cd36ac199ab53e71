"""Image augmentation on the device: random shifts, brightness and contrast, per sample and camera."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, UInt8

from vla_jax.finite import finite
from vla_jax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("augment.")
class AugmentConfig:
    """How training images are varied; everything 0 leaves them alone."""

    shift: int = 0
    """Largest shift in pixels, each way and axis; the border is repeated."""
    brightness: float = 0.0
    """Largest change of brightness, as a share of the full range."""
    contrast: float = 0.0
    """Largest relative change of contrast about the image's mean."""

    def __post_init__(self):
        if self.shift < 0:
            raise ValueError(f"augment.shift={self.shift}: pixels cannot be negative")
        for name in ("brightness", "contrast"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"augment.{name}={getattr(self, name)}: must lie in [0, 1)")


def augment(key: PRNGKeyArray, batch: Batch, config: AugmentConfig) -> Batch:
    """A batch with varied images. Cameras vary independently of one another."""
    if config == AugmentConfig():
        return batch
    keys = jax.random.split(key, len(batch.images))
    names = sorted(batch.images)
    return batch.replace(
        images={name: augment_images(k, batch.images[name], config) for name, k in zip(names, keys)}
    )


def augment_images(
    key: PRNGKeyArray, images: UInt8[Array, "b h w 3"], config: AugmentConfig
) -> UInt8[Array, "b h w 3"]:
    """Varies each image of a batch on its own."""
    b = images.shape[0]
    key_shift, key_brightness, key_contrast = jax.random.split(key, 3)
    if config.shift:
        pad = config.shift
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
        offsets = jax.random.randint(key_shift, (b, 2), 0, 2 * pad + 1)
        images = jax.vmap(
            lambda image, offset: jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])
        )(padded, offsets)
    if config.brightness or config.contrast:
        x = images.astype(jnp.float32)
        scale = 1 + config.contrast * jax.random.uniform(key_contrast, (b, 1, 1, 1), minval=-1, maxval=1)
        shift = (
            255 * config.brightness * jax.random.uniform(key_brightness, (b, 1, 1, 1), minval=-1, maxval=1)
        )
        mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
        images = jnp.clip(jnp.round((x - mean) * scale + mean + shift), 0, 255).astype(jnp.uint8)
    return images
