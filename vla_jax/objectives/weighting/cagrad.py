"""CAGrad: the steepest descent of the worse-off loss near the plain sum (Liu et al. 2021, arXiv:2110.14048).

With the mean gradient g_0 = (g_t + g_a) / 2, the direction d within ‖d - g_0‖ <= c ‖g_0‖ whose smaller descent
min(g_t · d, g_a · d) is largest is (eq. 4 and 5)

    d = g_0 + c ‖g_0‖ / ‖g_w‖ · g_w,    g_w = w g_t + (1 - w) g_a
    w = argmin over [0, 1] of g_w · g_0 + c ‖g_0‖ ‖g_w‖

c = 0 is the plain sum; for c < 1 it rests only where the plain sum does, which other surgery does not.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from vla_jax.objectives.weighting.base import Pair, Scalar, Stateless, Weights, everywhere, ratio
from vla_jax.objectives.weighting.pcgrad import scaled


@dataclasses.dataclass(frozen=True)
class CAGrad(Stateless):
    """2d on the trunk, for g_t and λ g_a, as of a plain sum; the others keep their own loss's gradient."""

    weight: float
    radius: float
    uses_gradients: ClassVar[bool] = True
    can_be_zero: ClassVar[bool] = False

    def weights(self, step, state, products) -> Weights:
        """From the two norms and the inner product."""
        p = scaled(products, self.weight)
        mean = jnp.sqrt(jnp.maximum(p.text + 2 * p.both + p.action, 0)) / 2
        w = worst_case(p.text, p.action, p.both, self.radius * mean)
        norm = jnp.sqrt(jnp.maximum(w**2 * p.text + 2 * w * (1 - w) * p.both + (1 - w) ** 2 * p.action, 0))
        extra = 2 * ratio(self.radius * mean, norm, 0.0)
        trunk = Pair(1 + extra * w, self.weight * (1 + extra * (1 - w)))
        return Weights(trunk, everywhere(1.0, self.weight).rest)


def worst_case(text: Scalar, action: Scalar, both: Scalar, length: Scalar) -> Scalar:
    """The w in [0, 1] with the smallest g_w · g_0 + length · ‖g_w‖.

    g_w · g_0 = s w + const with s = (text - action) / 2, and ‖g_w‖² = A w² + B w + C. The function is convex; where its
    slope s + length (2 A w + B) / (2 ‖g_w‖) vanishes, y = 2 A w + B solves y² (length² - s² / A) = s² D / A, with
    D = 4 A C - B² and the sign of -s. Where there is no such y, the slope has the sign of s everywhere.
    """
    s = (text - action) / 2
    a, b = text - 2 * both + action, 2 * (both - action)
    a = jnp.maximum(a, 0)
    room = length**2 * a - s**2
    d = jnp.maximum(4 * a * action - b**2, 0)
    interior = (a > 0) & (room > 0)
    y = -s * jnp.sqrt(d / jnp.where(interior, room, 1))
    w = jnp.clip((y - b) / jnp.where(a > 0, 2 * a, 1), 0, 1)
    edge = jnp.where(s > 0, 0.0, jnp.where(s < 0, 1.0, 0.5))
    return jnp.where(interior, w, edge)
