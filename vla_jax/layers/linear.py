"""Products with weights, each with what lies beside its matrix in the parameters.

A weight may be kept as 8-bit integers with a scale per output, (x·W)·scale. And there may be LoRA's factors:
y = x·W + (x·A)·B, rounded once.

A module declares a weight with `declare` and multiplies with `multiply`; where nothing lies beside the weight in the
parameters (`layers/lora.py`, `layers/int8.py`), that is a plain einsum. A·B is never added to W: with a W that is
exact in bfloat16, as all converted weights are, the sum of W and a small A·B would be rounded back to W itself. For the
same reason the two products are added in float32 before they are rounded to the type of x.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int8

from vla_jax.layers import init

SUFFIX = "_lora"
"""The factors of parameter `w` are the parameters `w_lora/a` and `w_lora/b`."""

SCALE = "_scale"
"""The scales of a parameter `w` that is kept as integers are the parameter `w_scale`: batches, then outputs."""

TURNED = "_inputs_first"
"""A parameter `w` may be kept as `w_inputs_first`: the axes of its inputs lead, those of batches and outputs follow. A
product with it then needs no transposed copy, which XLA on CPU makes anew at every evaluation of a loop."""

SUM = "lora_sum"
"""The name that rematerialisation knows the sum of both products by (`models/stack.py`)."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("w", "a", "b", "scale"), meta_fields=("turned",)
)
@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight, and what lies beside it; LoRA's scale α/r is in b. Axes of w: batches, inputs and outputs."""

    w: Float[Array, "..."] | Int8[Array, "..."]
    a: Float[Array, "*axes r"] | None = None  # batches, inputs, rank
    b: Float[Array, "..."] | None = None  # batches, rank, outputs
    scale: Float[Array, "..."] | None = None  # batches, outputs
    turned: bool = False  # w has the axes of its inputs first

    def part(self, i: int) -> "Matrix":
        """Number i of a batch of matrices."""
        return jax.tree.map(lambda x: x[i], self)

    def inputs(self, start: int, stop: int) -> "Matrix":
        """Some rows of one matrix [inputs, outputs]: what multiplies a part of concatenated inputs."""
        a = None if self.a is None else self.a[start:stop]
        return dataclasses.replace(self, w=self.w[start:stop], a=a)


def declare(module: nn.Module, name: str, initializer: Initializer, shape: Sequence[int]) -> Matrix:
    """Parameter `name` of a module, with what lies beside it. Called within a compact method or setup."""
    a, b, scale, turned = None, None, None, module.has_variable("params", name + TURNED)
    find = module.get_variable if turned else None
    w = find("params", name + TURNED) if find else module.param(name, initializer, tuple(shape))
    if module.has_variable("params", name + SUFFIX):
        factors = module.get_variable("params", name + SUFFIX)
        a, b = factors["a"], factors["b"]
    if module.has_variable("params", name + SCALE):
        scale = module.get_variable("params", name + SCALE)
    return Matrix(w, a, b, scale, turned)


def multiply(equation: str, x: Float[Array, "..."], matrix: Matrix) -> Float[Array, "..."]:
    """The einsum "x,w->y" in the dtype of `x`. Contracted axes of w are its inputs; see `Matrix`."""
    w = matrix.w.astype(x.dtype)
    whole = inputs_first(equation) if matrix.turned else equation
    if matrix.scale is not None:
        return _scaled(equation, whole, x, w, matrix)
    if matrix.a is None or matrix.b is None:
        return jnp.einsum(whole, x, w)
    narrow, widen = low_rank_equations(equation, matrix.a.ndim)
    hidden = jnp.einsum(narrow, x, matrix.a.astype(x.dtype))
    y = _add((whole, widen), x, w, hidden, matrix.b.astype(x.dtype))
    return y if x.dtype == jnp.float32 else checkpoint_name(y, SUM)


def inputs_first(equation: str) -> str:
    """ "x,w->y" for a w whose axes of inputs lead."""
    x, w, y = equation.replace("->", ",").split(",")
    inputs = "".join(letter for letter in w if letter in x and letter not in y)
    return f"{x},{inputs}{''.join(letter for letter in w if letter not in inputs)}->{y}"


def _scaled(equation: str, whole: str, x: Array, w: Array, matrix: Matrix) -> Array:
    """Of integers: the scales belong to outputs, so they multiply the product, in float32."""
    y = jnp.einsum(whole, x, w, preferred_element_type=jnp.float32)
    _, weight, result = equation.replace("->", ",").split(",")
    outputs = "".join(letter for letter in weight if letter in result)
    y = jnp.einsum(f"{result},{outputs}->{result}", y, matrix.scale)
    if matrix.a is not None and matrix.b is not None:
        narrow, widen = low_rank_equations(equation, matrix.a.ndim)
        hidden = jnp.einsum(narrow, x, matrix.a.astype(x.dtype))
        y = y + _small(widen, hidden, matrix.b.astype(x.dtype))
    return y.astype(x.dtype)


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
    y = y + _small(widen, hidden, b)
    return y.astype(x.dtype)


def _small(widen: str, hidden: Array, b: Array) -> Array:
    """hidden · B in float32. The factors are turned to float32 first, which changes no product of two bfloat16 numbers:
    XLA on CPU has no batched product of bfloat16 with a float32 result."""
    return jnp.einsum(widen, hidden.astype(jnp.float32), b.astype(jnp.float32))


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
    """x · kernel + bias; parameters as of flax's Dense."""

    features: int
    dtype: jnp.dtype | None
    """Of inputs, product and result; None: as x comes."""
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        """[… d] to [… features]."""
        dtype = self.dtype or x.dtype
        kernel = declare(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        return multiply("...d,df->...f", x.astype(dtype), kernel) + bias.astype(dtype)


def dense(
    width: int, names: tuple[str | None, str | None], dtype: jnp.dtype | None, name: str | None = None
) -> Dense:
    """`Dense` with the usual start, whose input and output axes have these logical names."""
    kernel, bias = init.kernel(names), init.zeros((names[1],))
    return Dense(width, dtype=dtype, kernel_init=kernel, bias_init=bias, name=name)


class Projection(nn.Module):
    """x · kernel + bias over the last `contracted` axes of x, which are the first of the kernel: to heads and back.

    flax's DenseGeneral does the same, but initialises a flattened kernel, which has no place for three axis names.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    contracted: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t ..."]) -> Float[Array, "b t ..."]:
        """[b t d] to [b t n e], or [b t n e] to [b t d]."""
        contracted = tuple(range(self.contracted))
        kernel = declare(self, "kernel", init.fan_in(self.names, in_axis=contracted), self.shape)
        bias = self.param("bias", init.zeros(self.names[self.contracted :]), self.shape[self.contracted :])
        into, outof = "def"[: self.contracted], "def"[self.contracted :]
        return multiply(f"bt{into},def->bt{outof}", x, kernel) + bias.astype(x.dtype)


def to_heads(width: int, heads: int) -> Projection:
    """[b t d] to `heads` heads that are together as wide."""
    return Projection(("embed", "heads", "head_dim"), (width, heads, width // heads), 1)


def from_heads(width: int, heads: int) -> Projection:
    """Heads joined again: [b t heads head_dim] → [b t width], with bias."""
    return Projection(("heads", "head_dim", "embed"), (heads, width // heads, width), 2)


class Patches(nn.Module):
    """Images cut into square patches, each times one matrix [patch patch channels d] plus bias, in float32.

    A product and not a convolution, which it is too: on CPUs it is faster. Parameters as of flax's Conv.
    """

    features: int
    patch: int
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b rows columns d"]:
        """Rows and columns of patches."""
        b, height, width, channels = x.shape
        p = self.patch
        kernel = declare(self, "kernel", self.kernel_init, (p, p, channels, self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        x = x.reshape(b, height // p, p, width // p, p, channels)
        return multiply("biyjxc,yxcd->bijd", x, kernel) + bias.astype(x.dtype)
