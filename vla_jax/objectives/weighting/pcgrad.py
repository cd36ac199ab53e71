"""PCGrad: where gradients conflict, each gives up its part against the others (Yu et al. 2020, arXiv:2001.06782).

Algorithm 1: every g_i is projected onto the normal plane of each g_j that it conflicts with, one after the other in
random order,

    g_i ← g_i - min(g_i · g_j, 0) / ‖g_j‖² g_j

and the results are added up, on the trunk; parameters that only one loss has keep its gradient. For two losses with
c = min(g_t · g_a, 0) that is (1 - c / ‖g_t‖²) g_t + (1 - c / ‖g_a‖²) g_a, and there is no order.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vla_jax.objectives.keys import named
from vla_jax.objectives.weighting.base import Gram, Remembered, Weighting, Weights, dot, ratio


@dataclasses.dataclass(frozen=True)
class PCGrad(Weighting):
    """The sum of the projected gradients of λ_i L_i."""

    uses_gradients: ClassVar[bool] = True

    def weights(self, step: Int[Array, ""] | int, state: Remembered, gram: Gram) -> Weights:
        """λ without a conflict, more in one."""
        scaled = self.scaled(gram)
        n = scaled.shape[0]
        key = named(jax.random.fold_in(jax.random.key(0), step), "pcgrad")
        projected = [
            projection(scaled, i, _order(jax.random.fold_in(key, i), [j for j in range(n) if j != i]))
            for i in range(n)
        ]
        return self.on_trunk(jnp.sum(jnp.stack(projected), axis=0))


def projection(gram: Gram, i: int, order: Int[Array, " others"]) -> Float[Array, " n"]:
    """The coefficients of g_i in all gradients, after it was projected against the others in this order."""
    own = jnp.zeros(gram.shape[0]).at[i].set(1)
    for j in order:
        conflict = -jnp.minimum(dot(own, gram[j]), 0)
        own = own.at[j].add(ratio(conflict, gram[j, j], 0.0))
    return own


def _order(key: Array, others: list[int]) -> Int[Array, " others"]:
    places = jnp.array(others)
    return jax.random.permutation(key, places) if len(others) > 1 else places
