"""Each loss is divided by its own running mean, so that both count as 1 whatever their units."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from vla_jax.objectives.weighting.base import Pair, Scalar, Weights, everywhere, zeros


@dataclasses.dataclass(frozen=True)
class LossEma:
    """w = (1 / m_text, λ / m_action), m the bias-corrected exponential mean of the losses before this step.

    A loss that was not seen yet has m = 1.
    """

    weight: float
    decay: float
    uses_gradients: ClassVar[bool] = False
    can_be_zero: ClassVar[bool] = False

    def init(self) -> dict[str, Pair]:
        """The decayed sum of each loss, and the sum of its coefficients, which corrects the bias."""
        return {"loss": Pair(*zeros(2)), "total": Pair(*zeros(2))}

    def weights(self, step, state, products) -> Weights:
        """The inverse of the two means."""

        def inverse(total: Scalar, loss: Scalar) -> Scalar:
            return jnp.where(total > 0, total / jnp.where(loss > 0, loss, 1), 1.0)

        text, action = (inverse(*x) for x in zip(state["total"], state["loss"]))
        return everywhere(text, self.weight * action)

    def update(self, state, losses, products) -> dict[str, Pair]:
        """Takes the losses into the means."""

        def mix(old: Pair, new: Pair) -> Pair:
            mixed = (self.decay * o + (1 - self.decay) * n for o, n in zip(old, new))
            return Pair(*(jnp.where(loss > 0, m, o) for loss, m, o in zip(losses, mixed, old)))

        return {"loss": mix(state["loss"], losses), "total": mix(state["total"], Pair(1.0, 1.0))}
