"""The scripted expert: a feedback law that follows the shortest path round the obstacle's chosen side."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.sim.tabletop.config import TabletopConfig
from vla_jax.sim.tabletop.geometry import LEFT, RIGHT, detour, segment_distance, segment_projection
from vla_jax.sim.tabletop.world import Scene, State, clearance, initial_state, move, pick, step, uniforms


def choose_side(config: TabletopConfig, scene: Scene, coin: Bool[Array, ""]) -> Int[Array, ""]:
    """The shorter side; where both are equally short (within the tolerance), left if the coin says so."""
    ways = detour(scene.start, scene.goal, scene.obstacle, config.detour_radius_m(scene.obstacle_radius))
    equal = jnp.abs(ways.left - ways.right) < config.side_tolerance_m
    return jnp.where(jnp.where(equal, coin, ways.left < ways.right), LEFT, RIGHT)


def expert_action(
    config: TabletopConfig, scene: Scene, state: State, side: Int[Array, ""]
) -> Float[Array, "3"]:
    """Heads for the goal if the way is free, else along the tangent to the detour circle on the given side.

    Full speed on the way, `approach_rate · distance` near the goal, closing on arrival. A gripper that has
    closed without an object opens and tries again. Inside the detour circle (after a disturbance) the
    direction leans outwards.
    """
    position, goal, centre = state.position, scene.goal, scene.obstacle
    radius = config.detour_radius_m(scene.obstacle_radius)
    distance = jnp.linalg.norm(goal - position)
    straight = (goal - position) * jnp.minimum(
        config.max_speed_m_per_s / distance, config.approach_rate_per_s
    )

    inwards = centre - position
    from_centre = jnp.linalg.norm(inwards)
    inwards = inwards / from_centre
    sin = -side * jnp.minimum(radius / from_centre, 1)  # anticlockwise to pass on the left
    cos = jnp.sqrt(1 - sin**2)
    turn = jnp.array([[cos, -sin], [sin, cos]])
    lean = jnp.maximum(radius - from_centre, 0) / config.margin_m
    tangent = turn @ inwards - lean * inwards
    tangent = config.max_speed_m_per_s * tangent / jnp.linalg.norm(tangent)

    ahead = segment_projection(centre, position, goal) > 0
    blocked = ahead & (segment_distance(centre, position, goal) < radius)
    closing = (state.opening < 1) & (distance <= config.hold_radius_m) & (state.opening > 0)
    close = closing | ((distance <= config.close_radius_m) & (state.opening > 0))
    return jnp.concatenate([jnp.where(blocked, tangent, straight), close[None].astype(jnp.float32)])


class ExpertEpisode(NamedTuple):
    """An expert's episode, padded to T = max_steps: `states` before each action, and the one at the end."""

    states: State
    actions: Float[Array, "t 3"]
    final: State

    @property
    def positions(self) -> Float[Array, "points 2"]:
        """All positions, the last one repeated after the end."""
        return jnp.concatenate([self.states.position, self.final.position[None]])


def rollout(
    config: TabletopConfig, scene: Scene, side: Int[Array, ""], disturbance: Float[Array, "t 2"]
) -> ExpertEpisode:
    """Runs the expert under additive velocity disturbances [m/s]; `actions` are its own, undisturbed ones.

    So the labels show how to come back (DART, Laskey et al. 2017). A disturbance that would bring the gripper
    too near to the obstacle is not executed.
    """

    def act(state: State, noise: Float[Array, "2"]):
        action = expert_action(config, scene, state, side)
        disturbed = action.at[:2].add(noise)
        room = clearance(config, scene, state.position, move(config, state.position, disturbed[:2]))
        executed = jnp.where(room >= config.burst_clearance_m, disturbed, action)
        return step(config, scene, state, executed), (state, action)

    final, (states, actions) = jax.lax.scan(act, initial_state(scene), disturbance)
    return ExpertEpisode(states=states, actions=actions, final=final)


def sample_disturbance(config: TabletopConfig, key: Array) -> Float[Array, "t 2"]:
    """Velocity bursts [m/s] for one demonstration, all zero in the undisturbed share of them."""
    chances, speeds = jax.random.split(key)
    bursts = config.max_steps // config.burst_steps + 2
    noisy, phase, active = uniforms(chances, 1, 1, bursts)
    velocities = config.burst_std_m_per_s * jax.random.normal(speeds, (bursts, 2))
    velocities *= ((active < config.burst_probability) & (noisy < config.noisy_fraction))[:, None]
    first = pick(phase[0], config.burst_steps)
    return velocities[(first + jnp.arange(config.max_steps)) // config.burst_steps]
