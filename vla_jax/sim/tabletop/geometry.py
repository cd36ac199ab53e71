"""Distances to segments, and shortest paths round a disc."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Point = Float[Array, "2"]
Scalar = Float[Array, ""]

LEFT, RIGHT = -1, 1
"""Sides of the obstacle: left is smaller x."""


def segment_projection(point: Point, start: Point, end: Point) -> Scalar:
    """Where on the segment, in [0, 1], lies the nearest point; 0 for a segment of no length."""
    along = end - start
    length2 = along @ along
    return jnp.where(
        length2 > 0, jnp.clip((point - start) @ along / jnp.where(length2 > 0, length2, 1), 0, 1), 0
    )


def segment_distance(point: Point, start: Point, end: Point) -> Scalar:
    """Distance from a point to a segment."""
    return jnp.linalg.norm(point - start - segment_projection(point, start, end) * (end - start))


class Detour(NamedTuple):
    """Shortest paths past a disc. An `arc` is the angle during which the path touches the disc, in radians.

    Where the straight line is free, the arc of its side is not positive and its length is the straight one.
    """

    left: Scalar
    right: Scalar
    left_arc: Scalar
    right_arc: Scalar

    @property
    def blocked(self):
        """Whether the disc lies in the straight line."""
        return (self.left_arc > 0) & (self.right_arc > 0)


def detour(start: Point, goal: Point, centre: Point, radius: Scalar | float) -> Detour:
    """Lengths of the two taut strings from start to goal, both outside the disc.

    A string is a tangent, an arc and a tangent: `sqrt(d₁²-r²) + r·arc + sqrt(d₂²-r²)` with distances `dᵢ` to
    the centre and `arc = φ - acos(r/d₁) - acos(r/d₂)`, where φ is the angle between start and goal as seen
    from the centre, measured on that side. From a start below to a goal above, left runs clockwise.
    """
    d1, d2 = jnp.linalg.norm(start - centre), jnp.linalg.norm(goal - centre)
    from_start, from_goal = (jnp.arctan2(p[1] - centre[1], p[0] - centre[0]) for p in (start, goal))
    tangents = jnp.sqrt(d1**2 - radius**2) + jnp.sqrt(d2**2 - radius**2)
    free = jnp.arccos(radius / d1) + jnp.arccos(radius / d2)
    right_arc = jnp.mod(from_goal - from_start, 2 * jnp.pi) - free
    left_arc = 2 * jnp.pi - 2 * free - right_arc
    straight = jnp.linalg.norm(goal - start)
    left, right = (jnp.where(arc > 0, tangents + radius * arc, straight) for arc in (left_arc, right_arc))
    return Detour(left=left, right=right, left_arc=left_arc, right_arc=right_arc)
