"""CAGrad: the steepest descent of the worst-off loss near the plain sum (Liu et al. 2021, arXiv:2110.14048).

With the mean gradient g_0 = Σ g_i / n, the direction d within ‖d - g_0‖ <= c ‖g_0‖ whose smallest descent
min_i g_i · d is largest is (eq. 4 and 5)

    d = g_0 + c ‖g_0‖ / ‖g_w‖ · g_w,    g_w = Σ w_i g_i
    w = argmin over w ≥ 0, Σ w = 1 of g_w · g_0 + c ‖g_0‖ ‖g_w‖

c = 0 is the plain sum; for c < 1 it rests only where the plain sum does, which other surgery does not.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vla_jax.objectives.weighting.base import Gram, Remembered, Scalar, Weighting, Weights, dot, ratio
from vla_jax.objectives.weighting.simplex import Ends, minimise


@dataclasses.dataclass(frozen=True)
class CAGrad(Weighting):
    """n d on the trunk, for the g_i of λ_i L_i, as of a plain sum; the others keep their own loss's gradient."""

    radius: float
    uses_gradients: ClassVar[bool] = True

    def weights(self, step: Int[Array, ""] | int, state: Remembered, gram: Gram) -> Weights:
        """From the inner products."""
        scaled, n = self.scaled(gram), len(self.lambdas)
        mean = jnp.sqrt(jnp.maximum(jnp.sum(scaled), 0)) / n
        w = worst_case(scaled, self.radius * mean)
        norm = jnp.sqrt(jnp.maximum(dot(w, dot(scaled, w)), 0))
        return self.on_trunk(1 + n * ratio(self.radius * mean, norm, 0.0) * w)


def worst_case(gram: Gram, length: Scalar) -> Float[Array, " n"]:
    """The w with the smallest g_w · g_0 + length · ‖g_w‖."""
    with_mean = jnp.mean(gram, axis=1)  # g_i · g_0

    def share(ends: Ends) -> Scalar:
        first, second = dot(gram, ends[0]), dot(gram, ends[1])
        slope = dot(ends[0] - ends[1], with_mean)
        return worse(dot(ends[0], first), dot(ends[1], second), dot(ends[0], second), slope, length)

    return minimise(gram.shape[0], share)


def worse(one: Scalar, other: Scalar, both: Scalar, s: Scalar, length: Scalar) -> Scalar:
    """The u in [0, 1] with the smallest s u + length · ‖u a + (1 - u) b‖, from ‖a‖², ‖b‖² and a · b.

    ‖u a + (1 - u) b‖² = A u² + B u + C. The function is convex; where its slope s + length (2 A u + B) / (2 ‖…‖)
    vanishes, y = 2 A u + B solves y² (length² - s² / A) = s² D / A, with D = 4 A C - B² and the sign of -s. Where there
    is no such y, the slope has the sign of s everywhere.
    """
    a, b = one - 2 * both + other, 2 * (both - other)
    a = jnp.maximum(a, 0)
    room = length**2 * a - s**2
    d = jnp.maximum(4 * a * other - b**2, 0)
    interior = (a > 0) & (room > 0)
    y = -s * jnp.sqrt(d / jnp.where(interior, room, 1))
    u = jnp.clip((y - b) / jnp.where(a > 0, 2 * a, 1), 0, 1)
    edge = jnp.where(s > 0, 0.0, jnp.where(s < 0, 1.0, 0.5))
    return jnp.where(interior, u, edge)
