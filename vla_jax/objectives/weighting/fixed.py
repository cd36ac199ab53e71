"""λ is a constant."""

import dataclasses
from typing import ClassVar

from vla_jax.objectives.weighting.base import Stateless, Weights, everywhere


@dataclasses.dataclass(frozen=True)
class Fixed(Stateless):
    """w = (1, λ), as in Transfusion (λ = 5), π0.5 (10) and knowledge insulation (1)."""

    weight: float
    uses_gradients: ClassVar[bool] = False
    can_be_zero: ClassVar[bool] = False

    def weights(self, step, state, products) -> Weights:
        """(1, λ)."""
        return everywhere(1.0, self.weight)
