"""λ holds the actions' gradient on the trunk at a fixed share of the text's."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from vla_jax.objectives.weighting.base import Scalar, Weights, everywhere, ratio


@dataclasses.dataclass(frozen=True)
class GradientRatio:
    """w = (1, r · ‖g_text‖ / ‖g_action‖): in every step ‖w_action g_action‖ / ‖g_text‖ = r, the action weight.

    Where a batch lacks one of the losses the last weight holds; before the first it is r.
    """

    weight: float
    uses_gradients: ClassVar[bool] = True
    can_be_zero: ClassVar[bool] = False

    def init(self) -> dict[str, Scalar]:
        """The last weight; in a dict, because a checkpoint's items are trees."""
        return {"weight": jnp.full((), self.weight, jnp.float32)}

    def weights(self, step, state, products) -> Weights:
        """Those of this step's gradients."""
        return everywhere(1.0, self._weight(state, products))

    def update(self, state, losses, products) -> dict[str, Scalar]:
        """The weight of this step."""
        return {"weight": self._weight(state, products)}

    def _weight(self, state, products) -> Scalar:
        norms = jnp.sqrt(ratio(products.text, products.action, 0.0))
        return jnp.where(norms > 0, self.weight * norms, state["weight"])
