"""Every λ is a constant."""

import dataclasses

from jaxtyping import Array, Int

from vla_jax.objectives.weighting.base import Gram, Remembered, Weighting, Weights


@dataclasses.dataclass(frozen=True)
class Fixed(Weighting):
    """w = λ, e.g. (1, λ) for text and action: Transfusion (λ = 5), π0.5 (10), knowledge insulation (1)."""

    def weights(self, step: Int[Array, ""] | int, state: Remembered, gram: Gram | None) -> Weights:
        """λ as it is given."""
        return self.everywhere(lambda name: self.lambdas[name])
