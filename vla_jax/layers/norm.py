"""RMSNorm and LayerNorm, plain and adaptive."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.layers.axes import constrain
from vla_jax.layers.init import ones, zeros
from vla_jax.layers.linear import Dense


def rms_normalize(x: Float[Array, "... d"], eps: float = 1e-6) -> Float[Array, "... d"]:
    """x / rms(x), computed and returned in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """RMSNorm whose scale is stored as the offset from 1 (Zhang & Sennrich 2019, arXiv:1910.07467; Gemma)."""

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises in float32 and returns the dtype of `x`."""
        initializer = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",))
        scale = nn.unbox(self.param("scale", initializer, (x.shape[-1],)))
        return (rms_normalize(x) * (1 + scale.astype(jnp.float32))).astype(x.dtype)


class Modulation(NamedTuple):
    """What a condition does to a norm and to the residual behind it, float32; axes of 1: all are alike."""

    scale: Float[Array, "#b #t d"]
    shift: Float[Array, "#b #t d"]
    gate: Float[Array, "#b #t d"]


def _parts(x: Float[Array, "#b #t cd"], count: int) -> list[Float[Array, "#b #t d"]]:
    """x in float32 and in parts of equal width, each whole on every device.

    Without the constraint each part would lie on some of the devices that share a matrix; XLA (jax 0.10.2) then put
    the sharding on the tokens, and computed wrong sums of them on a mesh of data, fsdp and tensor.
    """
    x = constrain(x.astype(jnp.float32), ("batch" if x.shape[0] > 1 else None, None, "act_embed"))
    return jnp.split(x, count, axis=-1)


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and residual gate are a linear function of a condition (π0.5).

    The projection starts at zero: scale 1, shift 0 and gate 0, so that a new block is the identity.
    """

    width: int

    def setup(self):
        """Declares `Dense_0`: condition → scale, shift and gate, zero at first."""
        self.Dense_0 = Dense(
            3 * self.width,
            dtype=None,
            kernel_init=zeros(("embed", "mlp")),
            bias_init=zeros(("mlp",)),
        )

    def modulation(self, condition: Float[Array, "#b #t g"]) -> Modulation:
        """What a condition does: `__call__` takes it in the condition's place, so that it can be computed before."""
        return Modulation(*_parts(self.Dense_0(condition), 3))

    def __call__(
        self, x: Float[Array, "b t d"], condition: Float[Array, "#b #t g"] | Modulation
    ) -> tuple[Float[Array, "b t d"], Float[Array, "#b #t d"]]:
        """Returns the modulated x and the gate of the residual that it opens."""
        by = condition if isinstance(condition, Modulation) else self.modulation(condition)
        return (rms_normalize(x) * (1 + by.scale) + by.shift).astype(x.dtype), by.gate.astype(x.dtype)


def layer_normalize(x: Float[Array, "... d"], eps: float) -> Float[Array, "... d"]:
    """(x - mean) / standard deviation, computed and returned in float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def layer_norm(dtype: jnp.dtype, eps: float = 1e-6) -> nn.LayerNorm:
    """flax's LayerNorm, statistics in float32, with the names of its axes."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, scale_init=ones(("embed",)), bias_init=zeros(("embed",)))


class ScaleShift(NamedTuple):
    """What a condition does to a norm, float32; axes of 1: all are alike."""

    scale: Float[Array, "#b #t d"]
    shift: Float[Array, "#b #t d"]


class AdaLayerNorm(nn.Module):
    """norm(x)·(1 + scale) + shift, both a linear function of a condition (Peebles & Xie 2023, arXiv:2212.09748, §3.2).

    The projection starts at zero, so that a new norm is a plain one.
    """

    width: int
    eps: float

    def setup(self):
        """Declares `Dense_0`: condition → scale and shift, zero at first."""
        self.Dense_0 = Dense(
            2 * self.width, dtype=None, kernel_init=zeros(("embed", "mlp")), bias_init=zeros(("mlp",))
        )

    def modulation(self, condition: Float[Array, "#b #t g"]) -> ScaleShift:
        """What a condition does: `__call__` takes it in the condition's place, so that it can be computed before."""
        return ScaleShift(*_parts(self.Dense_0(condition), 2))

    def __call__(
        self, x: Float[Array, "b t d"], condition: Float[Array, "#b #t g"] | ScaleShift
    ) -> Float[Array, "b t d"]:
        """The modulated x, in its dtype."""
        by = condition if isinstance(condition, ScaleShift) else self.modulation(condition)
        return (layer_normalize(x, self.eps) * (1 + by.scale) + by.shift).astype(x.dtype)
