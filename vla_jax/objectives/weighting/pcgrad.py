"""PCGrad: where gradients conflict, each gives up its part against the other (Yu et al. 2020, arXiv:2001.06782).

With c = min(g_t · g_a, 0), algorithm 1 for two losses is

    g_t' + g_a' = (g_t - c / ‖g_a‖² g_a) + (g_a - c / ‖g_t‖² g_t) = (1 - c / ‖g_t‖²) g_t + (1 - c / ‖g_a‖²) g_a

on the trunk; parameters that only one loss has keep its gradient.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from vla_jax.objectives.weighting.base import Pair, Products, Stateless, Weights, everywhere, ratio


@dataclasses.dataclass(frozen=True)
class PCGrad(Stateless):
    """The sum of the projected gradients of L_text and λ L_action."""

    weight: float
    uses_gradients: ClassVar[bool] = True
    can_be_zero: ClassVar[bool] = False

    def weights(self, step, state, products) -> Weights:
        """(1, λ) without a conflict, more of both in one."""
        p = scaled(products, self.weight)
        conflict = -jnp.minimum(p.both, 0)
        trunk = Pair(1 + ratio(conflict, p.text, 0.0), self.weight * (1 + ratio(conflict, p.action, 0.0)))
        return Weights(trunk, everywhere(1.0, self.weight).rest)


def scaled(products: Products, weight: float) -> Products:
    """The products where the action loss is multiplied by `weight`."""
    return Products(products.text, weight**2 * products.action, weight * products.both)
