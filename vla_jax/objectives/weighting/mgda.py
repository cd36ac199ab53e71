"""MGDA: the shortest vector between the gradients (Désidéri 2012; Sener & Koltun 2018, arXiv:1810.04650, eq. 3 and 4).

    α = argmin ‖Σ α_i g_i‖ over α ≥ 0, Σ α = 1;    for two: clip(((g_2 - g_1) · g_2) / ‖g_1 - g_2‖², 0, 1)

It descends on all losses, and vanishes exactly where no direction does: on the Pareto front. Sener & Koltun go to it by
Frank and Wolfe's steps, which approach it slowly; see `simplex` for ours.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vla_jax.objectives.weighting.base import Gram, Remembered, Scalar, Weighting, Weights, dot
from vla_jax.objectives.weighting.simplex import Ends, minimise


@dataclasses.dataclass(frozen=True)
class MGDA(Weighting):
    """n Σ α_i λ_i g_i on the trunk (α for λ_i g_i); the weights sum to n, as of a plain sum.

    Parameters outside the trunk keep their own loss's gradient, as in the paper.
    """

    uses_gradients: ClassVar[bool] = True

    def weights(self, step: Int[Array, ""] | int, state: Remembered, gram: Gram) -> Weights:
        """From the inner products."""
        return self.on_trunk(len(self.lambdas) * shortest(self.scaled(gram)))


def shortest(gram: Gram) -> Float[Array, " n"]:
    """α of the shortest Σ α_i g_i."""

    def share(ends: Ends) -> Scalar:
        first, second = dot(gram, ends[0]), dot(gram, ends[1])
        return shorter(dot(ends[0], first), dot(ends[1], second), dot(ends[0], second))

    return minimise(gram.shape[0], share)


def shorter(one: Scalar, other: Scalar, both: Scalar) -> Scalar:
    """u of the shortest u a + (1 - u) b, from ‖a‖², ‖b‖² and a · b; 1/2 where they are equal."""
    apart = one - 2 * both + other
    u = jnp.clip((other - both) / jnp.where(apart > 0, apart, 1), 0, 1)
    return jnp.where(apart > 0, u, 0.5)
