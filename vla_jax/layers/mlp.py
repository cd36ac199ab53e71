"""Feed-forward blocks."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.layers.axes import constrain
from vla_jax.layers.init import fan_in


class GeGLU(nn.Module):
    """gelu_tanh(x·W0) ∘ (x·W1) · W (Shazeer 2020, arXiv:2002.05202), without biases, in Gemma's layout."""

    width: int
    hidden: int
    length: str = "length"
    """Logical name of the axis of tokens."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Maps [b t d] to [b t d] in the dtype of `x`."""
        gating = self.param(
            "gating_einsum",
            fan_in((None, "embed", "mlp"), in_axis=1, batch_axis=0),
            (2, self.width, self.hidden),
        ).astype(x.dtype)
        linear = self.param("linear", fan_in(("mlp", "embed"), in_axis=0), (self.hidden, self.width)).astype(
            x.dtype
        )
        hidden = nn.gelu(jnp.einsum("btd,df->btf", x, gating[0])) * jnp.einsum("btd,df->btf", x, gating[1])
        hidden = constrain(hidden, ("batch", self.length, "act_mlp"))
        return jnp.einsum("btf,fd->btd", hidden, linear)
