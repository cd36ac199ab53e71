"""GradNorm: weights that balance gradient norms and training rates (Chen et al. 2018, arXiv:1711.02257).

With G_i = ‖w_i g_i‖ on the trunk and r_i = L_i / L_i(0), the loss's inverse training rate relative to the mean of all,
the rule's target is G_i = mean(G) · r_i^α. That is one equation for each loss but the first,

    G_i / G_1 = λ_i / λ_1 · (r_i / r_1)^α

(λ = 1 in the paper), with the weights normalised to Σ w = n. The paper descends on the absolute difference of both
sides; here each ρ_i = log(w_i / w_1) descends on half the squared difference of their logarithms. It has the same
minimum, and its step does not depend on the gradients' size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vla_jax.objectives.weighting.base import Gram, Named, Weighting, Weights, ratio, zero
from vla_jax.objectives.weighting.saved import bare, with_names


@dataclasses.dataclass(frozen=True)
class GradNorm(Weighting):
    """ρ_i ← ρ_i - rate · (log G_i / G_1 - log λ_i / λ_1 · (r_i / r_1)^α)."""

    rate: float
    asymmetry: float
    uses_gradients: ClassVar[bool] = True

    def init(self) -> dict:
        """ρ of each loss but the first, and the losses of the first step (0: not seen yet)."""
        return {
            "log_ratio": bare({name: zero() for name in self._others}),
            "first": self.by_name(lambda name: 0.0),
        }

    def weights(self, step: Int[Array, ""] | int, state: dict, gram: Gram) -> Weights:
        """n · softmax of (0, ρ)."""
        logs = with_names(state["log_ratio"], self._others)
        shares = jax.nn.softmax(jnp.stack([zero(), *(logs[name] for name in self._others)]))
        found = dict(zip(self.lambdas, len(self.lambdas) * shares))
        return self.everywhere(found.__getitem__)

    def update(self, state: dict, losses: Named, gram: Gram) -> dict:
        """One step towards the balance; none where one of the two losses or its gradient is 0."""
        seen = state["first"]
        first = self.by_name(lambda name: jnp.where(seen[name] > 0, seen[name], losses[name]))
        progress = {name: ratio(losses[name], first[name], 0.0) for name in self.lambdas}
        logs, (one, *_) = with_names(state["log_ratio"], self._others), self.lambdas
        found = {}
        for i, name in enumerate(self._others, start=1):
            norms = jnp.sqrt(ratio(gram[i, i], gram[0, 0], 0.0))
            rates = ratio(progress[name], progress[one], 0.0)
            valid = (norms > 0) & (rates > 0)
            norms, rates = jnp.where(valid, norms, 1), jnp.where(valid, rates, 1)
            target = jnp.log(self.lambdas[name] / self.lambdas[one]) + self.asymmetry * jnp.log(rates)
            found[name] = logs[name] - jnp.where(valid, self.rate * (logs[name] + jnp.log(norms) - target), 0)
        return {"log_ratio": bare(found), "first": first}

    @property
    def _others(self) -> list[str]:
        return list(self.lambdas)[1:]
