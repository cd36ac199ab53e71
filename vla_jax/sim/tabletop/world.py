"""The tabletop's scenes and physics: pure functions of one scene; vmap them for more.

State is (x_m, y_m, opening: 1 open … 0 closed), action is (vx_m_per_s, vy_m_per_s, gripper_close: above 0.5
closes, otherwise opens). Only the obstacle, a disc, can be hit; objects lie flat.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vla_jax.sim.tabletop.config import KINDS, TabletopConfig
from vla_jax.sim.tabletop.geometry import detour, segment_distance

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("block", "cup", "ball")
OBJECTS = 3
CANDIDATES = 8
"""Starts of which `scattered_start` takes the first free one."""
NOTHING = -1
"""The value of `State.reached` before the gripper has closed on an object."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What lies on the table and does not move. `target` is the index of the object that is asked for."""

    objects: Float[Array, "3 2"]
    colours: Int[Array, "3"]
    shapes: Int[Array, "3"]
    obstacle: Float[Array, "2"]
    obstacle_radius: Float[Array, ""]
    start: Float[Array, "2"]
    target: Int[Array, ""]

    @property
    def goal(self) -> Float[Array, "2"]:
        """Centre of the target."""
        return self.objects[self.target]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The robot, and how its episode stands. `reached` is the object that the gripper closed on, or NOTHING."""

    position: Float[Array, "2"]
    opening: Float[Array, ""]
    steps: Int[Array, ""]
    done: Bool[Array, ""]
    success: Bool[Array, ""]
    collision: Bool[Array, ""]
    reached: Int[Array, ""]

    @property
    def vector(self) -> Float[Array, "3"]:
        """What the robot knows of itself: x_m, y_m, opening."""
        return jnp.concatenate([self.position, self.opening[None]])


def uniforms(key: Array, *sizes: int) -> list[Float[Array, "..."]]:
    """Vectors of uniform numbers, cut from one draw: many small draws take XLA long to compile."""
    return jnp.split(jax.random.uniform(key, (sum(sizes),)), np.cumsum(sizes)[:-1])


def pick(u: Float[Array, ""], count: int) -> Int[Array, ""]:
    """An index below `count` from a uniform number."""
    return jnp.minimum((u * count).astype(jnp.int32), count - 1)


def sample_scene(config: TabletopConfig, key: Array, kind: Int[Array, ""]) -> Scene:
    """Draws a scene of one kind: three distinct objects far away, a start nearby, an obstacle in between."""
    start, target, looks, along, across, obstacle = uniforms(
        key, 2, 1, 1 + len(COLOURS) * (len(SHAPES) + 1), OBJECTS, OBJECTS, 5
    )
    start = jnp.stack([_between(start[0], config.start_x_m), _between(start[1], config.start_y_m)])
    target = pick(target[0], OBJECTS)
    colours, shapes = _sample_looks(config, looks[0], looks[1:])
    objects = _place_objects(config, along, across)
    obstacle, radius = _place_obstacle(config, obstacle, kind, start, objects[target])
    return Scene(
        objects=objects,
        colours=colours,
        shapes=shapes,
        obstacle=obstacle,
        obstacle_radius=radius,
        start=start,
        target=target,
    )


def _sample_looks(
    config: TabletopConfig, alike: Float[Array, ""], u: Float[Array, " looks"]
) -> tuple[Int[Array, "3"], Int[Array, "3"]]:
    """Three distinct (colour, shape) pairs; their colours differ too, but for `alike_fraction` of the scenes."""
    for_colours, for_pairs = u[: len(COLOURS)], u[len(COLOURS) :]
    any_pair = jnp.argsort(for_pairs)[:OBJECTS]  # a random permutation's first three: distinct
    colours = jnp.argsort(for_colours)[:OBJECTS]
    shapes = jnp.argmax(for_pairs.reshape(len(COLOURS), len(SHAPES))[colours], axis=1)
    may_repeat = alike < config.alike_fraction
    return (
        jnp.where(may_repeat, any_pair // len(SHAPES), colours),
        jnp.where(may_repeat, any_pair % len(SHAPES), shapes),
    )


def _between(u: Float[Array, "..."], bounds: tuple[float, float]) -> Float[Array, "..."]:
    return bounds[0] + u * (bounds[1] - bounds[0])


def _place_objects(config: TabletopConfig, along, across) -> Float[Array, "3 2"]:
    """Uniform over all placements whose x differ by the gap: sorted uniforms in the free width, then spread."""
    low, high = config.object_x_m
    free = high - low - (OBJECTS - 1) * config.object_gap_m
    x = low + jnp.sort(along) * free + jnp.arange(OBJECTS) * config.object_gap_m
    return jnp.stack([x, _between(across, config.object_y_m)], axis=1)


def _place_obstacle(config: TabletopConfig, u: Float[Array, "5"], kind, start, goal):
    """Centre and radius: on the straight line (symmetric), beside its middle, or wholly beside it (clear)."""
    radius = _between(u[0], config.obstacle_radius_m)
    y = _between(u[1], config.obstacle_y_m)
    detour_radius = config.detour_radius_m(radius)
    asymmetric = _between(u[2], config.asymmetric_shift_m)
    clear = detour_radius + _between(u[3], config.clear_gap_m)
    offset = jnp.stack([jnp.zeros(()), asymmetric, clear])[kind]
    line = goal - start
    x = start[0] + line[0] * (y - start[1]) / line[1]
    shift = offset * jnp.linalg.norm(line) / line[1]  # along x, so that the distance to the line is `offset`
    shift = jnp.where(u[4] < 0.5, shift, -shift)
    # Both ways round stay on the table, except where the straight line is free: there the disc itself does.
    reach = jnp.where(kind == KINDS.index("clear"), radius, detour_radius + config.gripper_radius_m)
    leaves = (x + shift < reach) | (x + shift > config.table_m - reach)
    return jnp.stack([x + jnp.where(leaves, -shift, shift), y]), radius


def scattered_start(config: TabletopConfig, key: Array, scene: Scene) -> Float[Array, "2"]:
    """A start anywhere on the table from which both ways round the obstacle exist; the scene's own if none is found."""
    candidates = jax.random.uniform(
        key, (CANDIDATES, 2), minval=config.gripper_radius_m, maxval=config.table_m - config.gripper_radius_m
    )
    free = jnp.linalg.norm(candidates - scene.obstacle, axis=1) > config.detour_radius_m(
        scene.obstacle_radius
    )
    return jnp.where(free.any(), candidates[jnp.argmax(free)], scene.start)


def scene_kind(config: TabletopConfig, scene: Scene) -> Int[Array, ""]:
    """Index into KINDS for the scene's present target, by the lengths of the two ways."""
    ways = detour(scene.start, scene.goal, scene.obstacle, config.detour_radius_m(scene.obstacle_radius))
    equal = jnp.abs(ways.left - ways.right) < config.side_tolerance_m
    return jnp.where(ways.blocked, jnp.where(equal, 0, 1), 2)


def initial_state(scene: Scene) -> State:
    """The robot at its start with an open gripper."""
    return State(
        position=scene.start,
        opening=jnp.ones(()),
        steps=jnp.zeros((), jnp.int32),
        done=jnp.zeros((), bool),
        success=jnp.zeros((), bool),
        collision=jnp.zeros((), bool),
        reached=jnp.full((), NOTHING, jnp.int32),
    )


def clearance(config: TabletopConfig, scene: Scene, start: Float[Array, "2"], end: Float[Array, "2"]):
    """Least distance between the gripper's and the obstacle's edges on a straight move; negative = overlap."""
    distance = segment_distance(scene.obstacle, start, end)
    return distance - scene.obstacle_radius - config.gripper_radius_m


def move(
    config: TabletopConfig, position: Float[Array, "2"], velocity: Float[Array, "2"]
) -> Float[Array, "2"]:
    """Where one control period brings the gripper: speed is limited, and it stays on the table."""
    speed = jnp.linalg.norm(velocity)
    velocity = velocity * jnp.minimum(1, config.max_speed_m_per_s / speed)
    low, high = config.gripper_radius_m, config.table_m - config.gripper_radius_m
    return jnp.clip(position + config.dt_s * velocity, low, high)


def step(config: TabletopConfig, scene: Scene, state: State, action: Float[Array, "3"]) -> State:
    """One control period. An episode that is done stays as it is.

    The gripper grasps at the moment at which it becomes closed: on the object within reach, else on nothing,
    and then it can open again. A collision anywhere on the move, or a grasped object, ends the episode.
    """
    position = move(config, state.position, action[:2])
    rate = jnp.where(action[2] > 0.5, -config.gripper_rate, config.gripper_rate)
    opening = jnp.clip(state.opening + rate, 0, 1)
    distances = jnp.linalg.norm(scene.objects - position, axis=1)
    nearest = jnp.argmin(distances).astype(jnp.int32)
    collision = clearance(config, scene, state.position, position) < 0
    grasps = (opening == 0) & (state.opening > 0) & (distances[nearest] <= config.grasp_radius_m) & ~collision
    steps = state.steps + 1
    after = State(
        position=position,
        opening=opening,
        steps=steps,
        done=collision | grasps | (steps >= config.max_steps),
        success=grasps & (nearest == scene.target),
        collision=collision,
        reached=jnp.where(grasps, nearest, NOTHING),
    )
    return jax.tree.map(lambda old, new: jnp.where(state.done, old, new), state, after)
