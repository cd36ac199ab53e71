"""Identity functions that change what flows back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def scale_gradient(x: Array, scale: float | Float[Array, ""]) -> Array:
    """x itself, bit for bit; its cotangent is multiplied by `scale`, which may be traced and has no gradient."""
    return x


def _forward(x: Array, scale: float | Float[Array, ""]) -> tuple[Array, Array]:
    return x, jnp.asarray(scale)


def _backward(scale: Array, cotangent: Array) -> tuple[Array, Array]:
    return cotangent * scale.astype(cotangent.dtype), jnp.zeros_like(scale)


scale_gradient.defvjp(_forward, _backward)
