"""Uncertainty weighting: each loss has a learned log-variance (Kendall et al. 2018, arXiv:1705.07115).

    minimise over s:   Σ_i exp(-s_i) L_i + s_i

so that at the optimum exp(-s_i) = 1 / L_i, and what the parameters see is the sum of log L_i. (Kendall's factors
of 1/2, on the Gaussian loss and on log σ² = s, halve all weights at the optimum and leave their ratios as they are.)
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from vla_jax.objectives.weighting.base import Gram, Named, Scalar, Weighting, Weights


@dataclasses.dataclass(frozen=True)
class Uncertainty(Weighting):
    """w_i = λ_i · exp(-s_i); s follows its gradient, 1 - exp(-s) L, at the given rate."""

    rate: float

    def init(self) -> Named:
        """The log-variances: 0, so that the weights are λ."""
        return self.by_name(lambda name: 0.0)

    def weights(self, step: Int[Array, ""] | int, state: Named, gram: Gram | None) -> Weights:
        """λ_i · exp(-s_i) with the log-variances s before this step."""
        return self.everywhere(lambda name: self.lambdas[name] * jnp.exp(-state[name]))

    def update(self, state: Named, losses: Named, gram: Gram | None) -> Named:
        """One step down the gradient."""

        def descend(name: str) -> Scalar:
            s, loss = state[name], losses[name]
            return jnp.where(loss > 0, s - self.rate * (1 - jnp.exp(-s) * loss), s)

        return self.by_name(descend)
