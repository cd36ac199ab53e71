"""Uncertainty weighting: each loss has a learned log-variance (Kendall et al. 2018, arXiv:1705.07115).

    minimise over s:   exp(-s_text) L_text + s_text + exp(-s_action) L_action + s_action

so that at the optimum exp(-s_i) = 1 / L_i, and what the parameters see is the sum of log L_i. (Kendall's factors
of 1/2, on the Gaussian loss and on log σ² = s, halve both weights at the optimum and leave their ratio as it is.)
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from vla_jax.objectives.weighting.base import Pair, Weights, everywhere, zeros


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """w = (exp(-s_text), λ · exp(-s_action)); s follows its gradient, 1 - exp(-s) L, at the given rate."""

    weight: float
    rate: float
    uses_gradients: ClassVar[bool] = False
    can_be_zero: ClassVar[bool] = False

    def init(self) -> Pair:
        """The two log-variances: 0, weights of 1 and λ."""
        return Pair(*zeros(2))

    def weights(self, step, state, products) -> Weights:
        """Of the log-variances before this step."""
        return everywhere(jnp.exp(-state.text), self.weight * jnp.exp(-state.action))

    def update(self, state, losses, products) -> Pair:
        """One step down the gradient."""

        def descend(s, loss):
            return jnp.where(loss > 0, s - self.rate * (1 - jnp.exp(-s) * loss), s)

        return jax.tree.map(descend, state, Pair(*losses))
