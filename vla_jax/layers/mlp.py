"""Feed-forward blocks of a transformer: Gemma's gated one and the plain one of SigLIP and the DiT expert."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.layers.axes import constrain
from vla_jax.layers.init import fan_in
from vla_jax.layers.linear import declare, dense, multiply


class GeGLU(nn.Module):
    """gelu_tanh(x·W0) ∘ (x·W1) · W (Shazeer 2020, arXiv:2002.05202), without biases, in Gemma's layout."""

    width: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], length: str = "length") -> Float[Array, "b t d"]:
        """Maps [b t d] to [b t d] in the dtype of `x`; `length` is the logical name of the axis of tokens."""
        names, sizes = (None, "embed", "mlp"), (2, self.width, self.hidden)
        gating = declare(self, "gating_einsum", fan_in(names, in_axis=1, batch_axis=0), sizes)
        linear = declare(self, "linear", fan_in(("mlp", "embed"), in_axis=0), (self.hidden, self.width))
        # Gate and up are one product, which reads x once.
        gate, up = jnp.split(multiply("btd,cdf->btcf", x, gating), 2, axis=2)
        hidden = constrain((nn.gelu(gate) * up)[:, :, 0], ("batch", length, "act_mlp"))
        return multiply("btf,fd->btd", hidden, linear)


class MLP(nn.Module):
    """gelu_tanh(x·W0 + b0)·W1 + b1; parameters as of big_vision's MlpBlock."""

    width: int
    hidden: int
    dtype: jnp.dtype

    def setup(self):
        """Declares `Dense_0` [d hidden] and `Dense_1` [hidden d], the names of flax's own Dense layers."""
        self.Dense_0 = dense(self.hidden, ("embed", "mlp"), self.dtype)
        self.Dense_1 = dense(self.width, ("mlp", "embed"), self.dtype)

    def __call__(self, x: Float[Array, "b t d"], length: str = "length") -> Float[Array, "b t d"]:
        """[b t d] to [b t d]; `length` is the logical name of the axis of tokens."""
        return self.Dense_1(constrain(nn.gelu(self.Dense_0(x)), ("batch", length, "act_mlp")))
