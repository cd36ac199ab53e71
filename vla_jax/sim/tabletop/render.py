"""Pictures of the tabletop, computed per pixel from analytic coverage: no renderer, one fused program.

A shape covers a pixel by `clip(½ - signed distance / pixel, 0, 1)`, exact for straight edges along the axes
and within a few percent of a pixel elsewhere. Image row 0 is the far side (largest y).

Jitted code returns pixels packed into words, and `to_images` unpacks them on the host: XLA's CPU code for three
interleaved bytes is several times slower than the picture itself.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt8

from vla_jax.sim.tabletop.config import TabletopConfig
from vla_jax.sim.tabletop.world import COLOURS, SHAPES, Scene, State

PALETTE = {"red": (214, 40, 40), "green": (36, 150, 62), "blue": (38, 82, 210), "yellow": (244, 196, 20)}
TABLE = (128, 128, 128)  # mid-grey: encoders map it to zero, so that a bare patch of table says nothing
OUTSIDE = (172, 188, 210)
OBSTACLE = (48, 48, 52)
GRIPPER_OPEN = (255, 255, 255)
GRIPPER_CLOSED = (255, 0, 200)
OUTLINE = (0, 0, 0)

BLOCK_HALF_M = 0.046
BALL_RADIUS_M = 0.051
CUP_RADIUS_M = 0.053
CUP_HOLE_M = 0.028
SHINE_RADIUS_M = 0.014
SHINE_OFFSET_M = 0.018
"""From the ball's centre to the left and to the far side."""
SHINE_OPACITY = 0.9
GRIPPER_EDGE_M = 0.006
"""The gripper is drawn a little wider than it collides, so that it is seen at one pixel per centimetre."""
ABSENT_M = -1.0
"""A radius that covers nothing."""


Plane = Float[Array, "h w"]
Broadcast = Float[Array, "#h #w"]
"""Coordinates of pixels: a row, a column or a plane."""
Planes = tuple[Plane, ...]
Words = Int[Array, "*any h w"]
"""Pixels as `red + 256·green + 65536·blue`."""


def render(config: TabletopConfig, scene: Scene, state: State) -> dict[str, Words]:
    """Both cameras: `top` sees the table, `wrist` a window around the gripper."""
    half = config.table_m / 2
    views = {
        "top": (jnp.array([half, half]), config.table_m / config.image_size),
        "wrist": (state.position, config.wrist_window_m / config.image_size),
    }
    return {name: render_view(config, scene, state, *view) for name, view in views.items()}


def to_images(words: dict[str, Words]) -> dict[str, UInt8[np.ndarray, "*any h w 3"]]:
    """Each camera's words as red, green and blue bytes, on the host."""
    return {name: np.ascontiguousarray(rgb_view(packed)) for name, packed in words.items()}


def rgb_view(words: Words) -> UInt8[np.ndarray, "*any h w 3"]:
    """The bytes of words, in place: every fourth byte is skipped."""
    packed = np.asarray(words).astype("<i4", copy=False)
    return packed.view(np.uint8).reshape(*packed.shape, 4)[..., :3]


def render_view(
    config: TabletopConfig, scene: Scene, state: State, centre: Float[Array, "2"], pixel: float
) -> Int[Array, "h w"]:
    """The square window around `centre` [m] in which a pixel is `pixel` metres wide."""
    offsets = (np.arange(config.image_size, dtype=np.float32) + 0.5 - config.image_size / 2) * pixel
    x = centre[0] + offsets[None, :]
    y = centre[1] - offsets[:, None]
    planes = gripper_over(config, state, x, y, pixel, background(config, scene, x, y, pixel))
    red, green, blue = (jnp.round(plane).astype(jnp.int32) for plane in planes)
    return red | (green << 8) | (blue << 16)


def background(config: TabletopConfig, scene: Scene, x, y, pixel: float) -> Planes:
    """Everything but the gripper, as one plane per colour channel. Things do not overlap, so layers add up."""
    half = config.table_m / 2
    on_table = _box(x - half, y - half, half, pixel)
    planes = [outside + (table - outside) * on_table for outside, table in zip(OUTSIDE, TABLE)]
    from_centre = jnp.sqrt((x - scene.obstacle[0]) ** 2 + (y - scene.obstacle[1]) ** 2)
    disc = _disc(from_centre, scene.obstacle_radius, pixel)
    planes = [plane + (colour - plane) * disc for plane, colour in zip(planes, OBSTACLE)]
    palette = jnp.array([PALETTE[name] for name in COLOURS], jnp.float32)
    for index in range(len(scene.shapes)):
        body, shine = object_coverage(
            scene.shapes[index], x - scene.objects[index, 0], y - scene.objects[index, 1], pixel
        )
        colour = palette[scene.colours[index]]
        planes = [plane + (colour[c] - plane) * body for c, plane in enumerate(planes)]
        planes = [plane + (255 - plane) * shine for plane in planes]
    return tuple(planes)


def object_coverage(shape: ArrayLike, dx: Broadcast, dy: Broadcast, pixel: float) -> tuple[Plane, Plane]:
    """Coverage by a block (square), cup (ring) or ball (disc with a shine) at the origin, and by the shine."""
    block, cup, ball = (shape == index for index in range(len(SHAPES)))
    distance = jnp.sqrt(dx**2 + dy**2)
    outer = jnp.where(cup, CUP_RADIUS_M, jnp.where(ball, BALL_RADIUS_M, ABSENT_M))
    hole = jnp.where(cup, CUP_HOLE_M, ABSENT_M)
    square = _box(dx, dy, jnp.where(block, BLOCK_HALF_M, ABSENT_M), pixel)
    from_shine = jnp.sqrt((dx + SHINE_OFFSET_M) ** 2 + (dy - SHINE_OFFSET_M) ** 2)
    shine = _disc(from_shine, jnp.where(ball, SHINE_RADIUS_M, ABSENT_M), pixel)
    return square + _disc(distance, outer, pixel) - _disc(distance, hole, pixel), SHINE_OPACITY * shine


def gripper_over(config: TabletopConfig, state: State, x, y, pixel: float, planes: Planes) -> Planes:
    """Draws the gripper: a black disc whose core is white when open and turns magenta as it closes."""
    distance = jnp.sqrt((x - state.position[0]) ** 2 + (y - state.position[1]) ** 2)
    body = _disc(distance, config.gripper_radius_m + GRIPPER_EDGE_M, pixel)
    core = _disc(distance, config.gripper_radius_m - GRIPPER_EDGE_M / 2, pixel)
    colours = zip(planes, OUTLINE, GRIPPER_OPEN, GRIPPER_CLOSED)
    return tuple(
        plane + (edge - plane) * body + (closed + (opened - closed) * state.opening - edge) * core
        for plane, edge, opened, closed in colours
    )


def _disc(distance: Plane, radius, pixel: float) -> Plane:
    return jnp.clip((radius - distance) / pixel + 0.5, 0, 1)


def _box(dx, dy, half, pixel: float) -> Plane:
    return jnp.clip((half - jnp.abs(dx)) / pixel + 0.5, 0, 1) * jnp.clip(
        (half - jnp.abs(dy)) / pixel + 0.5, 0, 1
    )
