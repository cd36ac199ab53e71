"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the split-halves layout of Gemma."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_rope(
    x: Float[Array, "b t n e"], positions: Int[Array, "b t"], max_wavelength: float = 10_000.0
) -> Float[Array, "b t n e"]:
    """Rotates the pair (x[i], x[i + e/2]) by position · max_wavelength^(-2i/e); angles in float32."""
    half = x.shape[-1] // 2
    frequency = max_wavelength ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency  # [b t e/2]
    sin, cos = jnp.sin(angle)[:, :, None, :], jnp.cos(angle)[:, :, None, :]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
