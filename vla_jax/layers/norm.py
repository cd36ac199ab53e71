"""RMSNorm, plain and adaptive."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",)), (x.shape[-1],)
        )
        return (rms_normalize(x) * (1 + scale.astype(jnp.float32))).astype(x.dtype)


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and residual gate are a linear function of a condition (π0.5).

    The projection starts at zero: scale 1, shift 0 and gate 0, so that a new block is the identity.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], condition: Float[Array, "b t_or_1 g"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t_or_1 d"]]:
        """Returns the modulated x and the gate of the residual that it opens."""
        modulation = Dense(
            3 * x.shape[-1],
            dtype=x.dtype,
            kernel_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed", "mlp")),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("mlp",)),
            name="Dense_0",
        )(condition)
        scale, shift, gate = jnp.split(modulation.astype(jnp.float32), 3, axis=-1)
        return (rms_normalize(x) * (1 + scale) + shift).astype(x.dtype), gate.astype(x.dtype)
