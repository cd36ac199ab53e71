"""How experts are told the time: its embedding, and a layer that mixes it into action tokens."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.layers import init
from vla_jax.layers.linear import declare, multiply


class ActionTimeMix(nn.Module):
    """[actions, time] · kernel + bias, with the time's part apart: it is the same for all actions of a chunk."""

    width: int
    dtype: jnp.dtype

    def setup(self):
        """Declares the layer; parameters as of flax's Dense."""
        shape = (2 * self.width, self.width)
        self.matrix = declare(self, "kernel", init.kernel(("embed", "mlp")), shape)
        self.bias = self.param("bias", init.zeros(("mlp",)), (self.width,))

    def of_time(self, embedded: Float[Array, "#r #k d"]) -> Float[Array, "#r #k d"]:
        """What the time adds, in float32."""
        half = self.matrix.inputs(self.width, 2 * self.width)
        return multiply("...d,df->...f", embedded, half) + self.bias.astype(jnp.float32)

    def __call__(
        self, actions: Float[Array, "r k d"], bias: Float[Array, "#r #k d"]
    ) -> Float[Array, "r k d"]:
        """Of action tokens and `of_time`, summed in float32."""
        mixed = multiply("...d,df->...f", actions, self.matrix.inputs(0, self.width))
        return (mixed.astype(jnp.float32) + bias).astype(self.dtype)


def embed_time(
    t: Float[Array, "*b"], width: int, min_period: float = 4e-3, max_period: float = 4.0
) -> Float[Array, "*b d"]:
    """Sine and cosine of 2π·t/period for log-spaced periods, by default π0's (its appendix B; openpi's constants)."""
    period = min_period * (max_period / min_period) ** jnp.linspace(0.0, 1.0, width // 2)
    angle = 2 * jnp.pi * t[..., None] / period
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
