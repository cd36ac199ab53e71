"""Each loss is divided by its own running mean, so that all count as 1 whatever their units."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from vla_jax.objectives.weighting.base import Gram, Named, Scalar, Weighting, Weights


@dataclasses.dataclass(frozen=True)
class LossEma(Weighting):
    """w_i = λ_i / m_i, m the bias-corrected exponential mean of the losses before this step.

    A loss that was not seen yet has m = 1.
    """

    decay: float

    def init(self) -> dict[str, Named]:
        """The decayed sum of each loss, and the sum of its coefficients, which corrects the bias."""
        return {"loss": self.by_name(lambda name: 0.0), "total": self.by_name(lambda name: 0.0)}

    def weights(self, step: Int[Array, ""] | int, state: dict[str, Named], gram: Gram | None) -> Weights:
        """λ times the inverse of the means."""

        def inverse(name: str) -> Scalar:
            total, loss = state["total"][name], state["loss"][name]
            return jnp.where(total > 0, total / jnp.where(loss > 0, loss, 1), 1.0)

        return self.everywhere(lambda name: self.lambdas[name] * inverse(name))

    def update(self, state: dict[str, Named], losses: Named, gram: Gram | None) -> dict[str, Named]:
        """Takes the losses into the means."""

        def mix(old: Named, new: Named) -> Named:
            mixed = {name: self.decay * old[name] + (1 - self.decay) * new[name] for name in old}
            return self.by_name(lambda name: jnp.where(losses[name] > 0, mixed[name], old[name]))

        ones = self.by_name(lambda name: 1.0)
        return {"loss": mix(state["loss"], losses), "total": mix(state["total"], ones)}
