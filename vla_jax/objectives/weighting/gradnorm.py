"""GradNorm: weights that balance gradient norms and training rates (Chen et al. 2018, arXiv:1711.02257).

With G_i = ‖w_i g_i‖ on the trunk and r_i = L_i / L_i(0), the loss's inverse training rate relative to the mean of
both, the rule's target is G_i = mean(G) · r_i^α. For two losses that is one equation,

    G_action / G_text = λ · (r_action / r_text)^α

(λ = 1 in the paper), with the weights normalised to w_text + w_action = 2. The paper descends on the absolute
difference of both sides; here ρ = log(w_action / w_text) descends on half the squared difference of their logarithms.
It has the same minimum, and its step does not depend on the gradients' size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from vla_jax.objectives.weighting.base import Pair, Weights, everywhere, ratio, zeros


@dataclasses.dataclass(frozen=True)
class GradNorm:
    """ρ ← ρ - rate · (log G_action / G_text - log λ (r_action / r_text)^α)."""

    weight: float
    rate: float
    asymmetry: float
    uses_gradients: ClassVar[bool] = True
    can_be_zero: ClassVar[bool] = False

    def init(self) -> dict:
        """ρ, and the losses of the first step (0: not seen yet)."""
        return {"log_ratio": zeros(1)[0], "first": Pair(*zeros(2))}

    def weights(self, step, state, products) -> Weights:
        """2 · softmax of (0, ρ)."""
        return everywhere(2 * jax.nn.sigmoid(-state["log_ratio"]), 2 * jax.nn.sigmoid(state["log_ratio"]))

    def update(self, state, losses, products) -> dict:
        """One step towards the balance; none where a loss or its gradient is 0."""
        first = Pair(*(jnp.where(f > 0, f, loss) for f, loss in zip(state["first"], losses)))
        norms = jnp.sqrt(ratio(products.action, products.text, 0.0))
        rates = ratio(ratio(losses.action, first.action, 0.0), ratio(losses.text, first.text, 0.0), 0.0)
        valid = (norms > 0) & (rates > 0)
        norms, rates = jnp.where(valid, norms, 1), jnp.where(valid, rates, 1)
        off = state["log_ratio"] + jnp.log(norms) - jnp.log(self.weight) - self.asymmetry * jnp.log(rates)
        return {"log_ratio": state["log_ratio"] - jnp.where(valid, self.rate * off, 0), "first": first}
