"""λ holds each gradient on the trunk at a fixed share of the text's."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from vla_jax.objectives.weighting.base import Gram, Named, Scalar, Weighting, Weights, ratio
from vla_jax.objectives.weighting.saved import bare, with_names


@dataclasses.dataclass(frozen=True)
class GradientRatio(Weighting):
    """w_text = 1, w_i = λ_i · ‖g_text‖ / ‖g_i‖: in every step ‖w_i g_i‖ / ‖g_text‖ = λ_i.

    Where a batch lacks one of the two losses the last weight holds; before the first it is λ_i.
    """

    uses_gradients: ClassVar[bool] = True

    def init(self) -> dict[str, Scalar | Named]:
        """The last weight of each loss but the text's; in a dict, because a checkpoint's items are trees."""
        return {"weight": bare({name: jnp.asarray(self.lambdas[name], jnp.float32) for name in self._others})}

    def weights(self, step: Int[Array, ""] | int, state: dict, gram: Gram) -> Weights:
        """Those of this step's gradients."""
        found = self._weights(state, gram)
        return self.everywhere(lambda name: found.get(name, 1.0))

    def update(self, state: dict, losses: Named, gram: Gram) -> dict[str, Scalar | Named]:
        """The weights of this step."""
        return {"weight": bare(self._weights(state, gram))}

    @property
    def _others(self) -> list[str]:
        return [name for name in self.lambdas if name != "text"]

    def _weights(self, state: dict, gram: Gram) -> Named:
        last, at = with_names(state["weight"], self._others), list(self.lambdas)
        text, found = at.index("text"), {}
        for name in self._others:
            i = at.index(name)
            norms = jnp.sqrt(ratio(gram[text, text], gram[i, i], 0.0))
            found[name] = jnp.where(norms > 0, self.lambdas[name] * norms, last[name])
        return found
