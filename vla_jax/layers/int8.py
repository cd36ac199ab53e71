"""Weight-only int8: a matrix as 8-bit integers and one float32 scale per output channel.

``w ≈ scale · q`` with ``scale = max|w| / 127`` over the inputs of each output (symmetric, round to nearest), so that
``x · w ≈ (x · q) · scale``: the integers are widened inside the product and the scale is applied to its result
(`layers/linear.py`). The scales of parameter `w` lie beside it, in `w_scale`.

qwix (Google's quantisation library for JAX, 0.1.8) was weighed: its providers intercept the einsums of modules, which
here have LoRA's factors beside their matrices; of its array functions we would need only what stands here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


class Int8Matrix(NamedTuple):
    """Integers, and a scale for each of the other axes than the inputs'."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]


def quantize(w: Float[Array, "..."], into: Sequence[int]) -> Int8Matrix:
    """The nearest integers, `into` being the axes of inputs; a channel of zeros stays one."""
    w = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w), axis=tuple(into), keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    return Int8Matrix(jnp.round(w / scale).astype(jnp.int8), jnp.squeeze(scale, axis=tuple(into)))


def dequantize(matrix: Int8Matrix, into: Sequence[int]) -> Float[Array, "..."]:
    """The matrix that is meant, float32."""
    axes = sorted(axis % matrix.values.ndim for axis in into)
    return matrix.values.astype(jnp.float32) * jnp.expand_dims(matrix.scale, axes)
