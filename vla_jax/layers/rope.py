"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the split-halves layout of Gemma."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """Sine and cosine of each token's angles: computed once for all layers, queries and keys."""

    sin: Float[Array, "b t half"]
    cos: Float[Array, "b t half"]


def rotation(positions: Int[Array, "b t"], width: int, max_wavelength: float = 10_000.0) -> Rotation:
    """Angles position · max_wavelength^(-2i/e) for heads of width e, float32."""
    half = width // 2
    # float32: in bfloat16 positions above 256 would no longer differ by one.
    frequency = max_wavelength ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return Rotation(jnp.sin(angle), jnp.cos(angle))


def rotate(x: Float[Array, "b t n e"], by: Rotation) -> Float[Array, "b t n e"]:
    """Rotates the pairs (x[i], x[i + e/2]), in float32."""
    half = x.shape[-1] // 2
    sin, cos = by.sin[:, :, None], by.cos[:, :, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
