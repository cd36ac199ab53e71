"""MGDA: the shortest vector between the two gradients (Désidéri 2012; Sener & Koltun 2018, arXiv:1810.04650, eq. 4).

    α = argmin over [0, 1] of ‖α g_t + (1 - α) g_a‖ = clip(((g_a - g_t) · g_a) / ‖g_t - g_a‖², 0, 1)

It descends on both losses, and vanishes exactly where no direction does: on the Pareto front.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from vla_jax.objectives.weighting.base import Pair, Scalar, Stateless, Weights, everywhere
from vla_jax.objectives.weighting.pcgrad import scaled


@dataclasses.dataclass(frozen=True)
class MGDA(Stateless):
    """2α g_t + 2(1 - α) λ g_a on the trunk (α for g_t and λ g_a); the weights sum to 2, as of a plain sum.

    Parameters outside the trunk keep their own loss's gradient, as in the paper.
    """

    weight: float
    uses_gradients: ClassVar[bool] = True
    can_be_zero: ClassVar[bool] = False

    def weights(self, step, state, products) -> Weights:
        """From the two norms and the inner product."""
        p = scaled(products, self.weight)
        alpha = shortest(p.text, p.action, p.both)
        return Weights(Pair(2 * alpha, 2 * (1 - alpha) * self.weight), everywhere(1.0, self.weight).rest)


def shortest(text: Scalar, action: Scalar, both: Scalar) -> Scalar:
    """α of the shortest α g_t + (1 - α) g_a; 1/2 where the gradients are equal."""
    apart = text - 2 * both + action
    alpha = jnp.clip((action - both) / jnp.where(apart > 0, apart, 1), 0, 1)
    return jnp.where(apart > 0, alpha, 0.5)
