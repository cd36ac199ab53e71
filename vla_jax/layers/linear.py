"""Products with weights, each with what LoRA put beside its matrix: y = x·W + (x·A)·B, rounded once.

A module declares a weight with `declare` and multiplies with `multiply`; where nothing lies beside the weight in the
parameters (`layers/lora.py`), that is a plain einsum. A·B is never added to W: with a W that is exact in bfloat16, as
all converted weights are, the sum of W and a small A·B would be rounded back to W itself. For the same reason the two
products are added in float32 before they are rounded to the type of x.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

SUFFIX = "_lora"
"""The factors of parameter `w` are the parameters `w_lora/a` and `w_lora/b`."""

SUM = "lora_sum"
"""The name that rematerialisation knows the sum of both products by (`models/stack.py`)."""


class Matrix(NamedTuple):
    """A weight, and its factors where it has them; the scale α/r is in b. Axes of w: batches, inputs and outputs."""

    w: Float[Array, "..."]
    a: Float[Array, "*axes r"] | None = None  # batches, inputs, rank
    b: Float[Array, "..."] | None = None  # batches, rank, outputs

    def part(self, i: int) -> "Matrix":
        """Number i of a batch of matrices."""
        return Matrix(*(None if x is None else x[i] for x in self))


def declare(module: nn.Module, name: str, initializer: Initializer, shape: Sequence[int]) -> Matrix:
    """Parameter `name` of a module, with its factors. Called within a compact method or setup."""
    w = module.param(name, initializer, tuple(shape))
    if not module.has_variable("params", name + SUFFIX):
        return Matrix(w)
    factors = module.get_variable("params", name + SUFFIX)
    return Matrix(w, factors["a"], factors["b"])


def multiply(equation: str, x: Float[Array, "..."], matrix: Matrix) -> Float[Array, "..."]:
    """The einsum "x,w->y" in the dtype of `x`. Contracted axes of w are its inputs; see `Matrix`."""
    w = matrix.w.astype(x.dtype)
    if matrix.a is None:
        return jnp.einsum(equation, x, w)
    narrow, widen = low_rank_equations(equation, matrix.a.ndim)
    hidden = jnp.einsum(narrow, x, matrix.a.astype(x.dtype))
    y = _add((equation, widen), x, w, hidden, matrix.b.astype(x.dtype))
    return y if x.dtype == jnp.float32 else checkpoint_name(y, SUM)


def low_rank_equations(equation: str, axes: int) -> tuple[str, str]:
    """ "x,a->h" and "h,b->y" of "x,w->y", where A has so many axes: batches, inputs, rank."""
    x, w, y = equation.replace("->", ",").split(",")
    inputs = "".join(letter for letter in w if letter in x and letter not in y)
    batch = w[: axes - 1 - len(inputs)]
    outputs = "".join(letter for letter in w if letter not in batch + inputs)
    hidden = "".join(letter for letter in y if letter not in outputs) + "z"  # dots of y stay
    return f"{x},{batch}{inputs}z->{hidden}", f"{hidden},{batch}z{outputs}->{y}"


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _add(equations: tuple[str, str], x: Array, w: Array, hidden: Array, b: Array) -> Array:
    """Both products, added in float32 and rounded once."""
    whole, widen = equations
    y = jnp.einsum(whole, x, w, preferred_element_type=jnp.float32)
    y = y + jnp.einsum(widen, hidden, b, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _add_jvp(equations, primals, tangents):
    """In the dtype of x throughout: the derivative of a float32 sum would multiply float32 with bfloat16."""
    x, w, hidden, b = primals
    dx, dw, dhidden, db = tangents
    whole, widen = equations
    terms = [(whole, dx, w), (whole, x, dw), (widen, dhidden, b), (widen, hidden, db)]
    moved = [jnp.einsum(e, *pair) for e, *pair in terms if not any(isinstance(p, SymbolicZero) for p in pair)]
    y = _add(equations, x, w, hidden, b)
    return y, sum(moved) if moved else jnp.zeros_like(y)


_add.defjvp(_add_jvp, symbolic_zeros=True)


class Dense(nn.Module):
    """x · kernel + bias, both in `dtype`; parameters as of flax's Dense."""

    features: int
    dtype: jnp.dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        """[… d] to [… features]."""
        kernel = declare(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        return multiply("...d,df->...f", x.astype(self.dtype), kernel) + bias.astype(self.dtype)


class Patches(nn.Module):
    """Images cut into square patches, each times one matrix [patch patch channels d] plus bias, in float32.

    Parameters as of flax's Conv.
    """

    features: int
    patch: int
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b rows columns d"]:
        """Rows and columns of patches."""
        p = self.patch
        kernel = declare(self, "kernel", self.kernel_init, (p, p, x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))

        def convolve(weights: Array) -> Array:
            return jax.lax.conv_general_dilated(
                x, weights.astype(x.dtype), (p, p), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        y = convolve(kernel.w) + bias.astype(x.dtype)
        return y if kernel.a is None else y + convolve(kernel.a) @ kernel.b
