"""Weight-only int8: a matrix as 8-bit integers and one float32 scale per output channel.

``w ≈ scale · q`` with ``scale = max|w| / 127`` over the inputs of each output (symmetric, round to nearest), so that
``x · w ≈ (x · q) · scale``: the integers are widened inside the product and the scale is applied to its result.

qwix (Google's quantisation library for JAX, 0.1.8) was weighed: its providers rewrite linen and nnx modules by
intercepting their einsums, and the compiled network has no modules; of its array functions we would need only what
stands here.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Matrix:
    """A quantised weight; the first `contracted` axes are the inputs, the others have a scale each."""

    values: Int8[Array, "inputs *outputs"]
    scale: Float[Array, "*outputs"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.values.shape

    @property
    def contracted(self) -> int:
        """How many axes are inputs."""
        return self.values.ndim - self.scale.ndim


def quantize(w: Float[Array, "inputs *outputs"], contracted: int = 1) -> Int8Matrix:
    """The nearest integers; a channel of zeros stays one."""
    w = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w), axis=tuple(range(contracted)))
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    return Int8Matrix(jnp.round(w / scale).astype(jnp.int8), scale)


def dequantize(w: Int8Matrix) -> Float[Array, "inputs *outputs"]:
    """The matrix that is meant, float32."""
    return w.values.astype(jnp.float32) * w.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A kept weight and LoRA's factors beside it, which are no part of its sum: x·W + (x·A)·B, rounded once."""

    base: Float[Array, "inputs *outputs"] | Int8Matrix
    a: Float[Array, "inputs r"]
    b: Float[Array, "r *outputs"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.base.shape


Kept = jax.Array | Int8Matrix | Adapted


def multiply(x: Float[Array, "*b inputs"], w: Kept) -> Float[Array, "..."]:
    """x · w in the dtype of x, over the last axis of x and the first of w."""
    if isinstance(w, Adapted):
        wide = jnp.float32
        if isinstance(w.base, Int8Matrix):
            y = jnp.tensordot(x, w.base.values.astype(x.dtype), 1, preferred_element_type=wide) * w.base.scale
        else:
            y = jnp.tensordot(x, w.base, 1, preferred_element_type=wide)
        hidden = jnp.tensordot(x, w.a.astype(x.dtype), 1)
        return (y + jnp.tensordot(hidden, w.b.astype(x.dtype), 1, preferred_element_type=wide)).astype(
            x.dtype
        )
    if isinstance(w, Int8Matrix):
        return (jnp.tensordot(x, w.values.astype(x.dtype), 1) * w.scale).astype(x.dtype)
    return jnp.tensordot(x, w, 1)


def size_bytes(tree: object) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
