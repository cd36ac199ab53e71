"""Geometry against brute force, scenes against their promises, physics step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.sim.tabletop import KINDS, TabletopConfig
from vla_jax.sim.tabletop.geometry import detour, segment_distance
from vla_jax.sim.tabletop.world import (
    NOTHING,
    Scene,
    initial_state,
    sample_scene,
    scene_kind,
    step,
)

CONFIG = TabletopConfig()


def brute_force_way(start, goal, centre, radius, sign, n=1440):
    """Shortest way through the corners of a fine polygon round the disc, on one side (+1 = anticlockwise)."""
    first = np.arctan2(*(start - centre)[::-1])
    last = np.arctan2(*(goal - centre)[::-1])
    angles = first + sign * np.linspace(0, (sign * (last - first)) % (2 * np.pi), n)
    corners = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)

    def legs(point):
        mix = np.linspace(0, 1, 200)[:, None, None]
        rooms = np.linalg.norm(point * (1 - mix) + corners * mix - centre, axis=2).min(0)
        return np.where(rooms >= radius - 1e-5, np.linalg.norm(corners - point, axis=1), np.inf)

    along = np.abs(angles - angles[0]) * radius
    to_corner = legs(start) - along
    from_corner = legs(goal) + along
    return (np.minimum.accumulate(to_corner) + from_corner).min()


def test_detour_lengths_are_those_of_the_shortest_polygons():
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(40):
        centre, radius = rng.uniform([0.2, 0.28], [0.44, 0.33]), rng.uniform(0.1, 0.14)
        start, goal = rng.uniform([0.2, 0.05], [0.44, 0.12]), rng.uniform([0.09, 0.5], [0.55, 0.57])
        ways = detour(*map(jnp.asarray, (start, goal, centre)), radius)
        room = segment_distance(*map(jnp.asarray, (centre, start, goal)))
        assert bool(ways.blocked) == (room < radius)
        if ways.blocked:
            checked += 1
            np.testing.assert_allclose(ways.left, brute_force_way(start, goal, centre, radius, -1), atol=2e-5)
            np.testing.assert_allclose(ways.right, brute_force_way(start, goal, centre, radius, 1), atol=2e-5)
        else:
            np.testing.assert_allclose(min(ways.left, ways.right), np.linalg.norm(goal - start), rtol=1e-6)
    assert checked > 10


def test_segment_distance_against_dense_samples():
    rng = np.random.default_rng(1)
    for _ in range(50):
        point, start, end = rng.uniform(size=(3, 2))
        dense = start + np.linspace(0, 1, 4001)[:, None] * (end - start)
        expected = np.linalg.norm(dense - point, axis=1).min()
        np.testing.assert_allclose(
            segment_distance(*map(jnp.asarray, (point, start, end))), expected, atol=1e-5
        )
    same = jnp.array([0.3, 0.4])
    np.testing.assert_allclose(segment_distance(jnp.zeros(2), same, same), 0.5, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_keep_their_promises(kind):
    n = 2000
    index = jnp.array(KINDS.index(kind))
    sample = jax.vmap(lambda seed: sample_scene(CONFIG, jax.random.key(seed), index))
    scenes = jax.jit(sample)(np.arange(n, dtype=np.uint32))
    kinds = jax.vmap(functools.partial(scene_kind, CONFIG))(scenes)
    assert (np.asarray(kinds) == KINDS.index(kind)).all()
    objects = np.asarray(scenes.objects)
    gaps = np.linalg.norm(objects[:, :, None] - objects[:, None], axis=-1)[:, *np.triu_indices(3, 1)]
    assert gaps.min() >= 0.14 - 1e-6
    looks = np.asarray(scenes.colours) * 3 + np.asarray(scenes.shapes)
    assert all(len(set(row)) == 3 for row in looks)
    assert set(looks.ravel()) == set(range(12)), "every colour and shape occurs"
    counts = np.bincount(np.asarray(scenes.target), minlength=3)
    assert (abs(counts - n / 3) < 5 * np.sqrt(n * 2 / 9)).all()
    # The two ways stay on the table (the disc itself does where the straight line is free), below the objects.
    radius = np.asarray(scenes.obstacle_radius)
    around = radius if kind == "clear" else radius + CONFIG.margin_m + 2 * CONFIG.gripper_radius_m
    x, y = np.asarray(scenes.obstacle).T
    assert (x - around > -1e-6).all() and (x + around < CONFIG.table_m + 1e-6).all()
    assert (y + radius + CONFIG.margin_m + CONFIG.gripper_radius_m < objects[:, :, 1].min(1)).all()
    goal = objects[np.arange(n), np.asarray(scenes.target)]
    start = np.asarray(scenes.start)
    along = goal - start
    offset = (along[:, 0] * (y - start[:, 1]) - along[:, 1] * (x - start[:, 0])) / np.linalg.norm(
        along, axis=1
    )
    low, high = {
        "symmetric": (0 * radius, 0 * radius),
        "asymmetric": CONFIG.asymmetric_shift_m,
        "clear": tuple(CONFIG.detour_radius_m(radius) + gap for gap in CONFIG.clear_gap_m),
    }[kind]
    assert (abs(offset) >= low - np.float32(1e-6)).all() and (abs(offset) <= high + np.float32(1e-6)).all()


def a_scene(**changes):
    fields = dict(
        objects=jnp.array([[0.1, 0.5], [0.32, 0.55], [0.5, 0.5]]),
        colours=jnp.array([0, 1, 2]),
        shapes=jnp.array([0, 1, 2]),
        obstacle=jnp.array([0.32, 0.3]),
        obstacle_radius=jnp.array(0.08),
        start=jnp.array([0.32, 0.1]),
        target=jnp.array(1),
    )
    return Scene(**(fields | changes))


def play(scene, actions):
    state = initial_state(scene)
    for action in actions:
        state = step(CONFIG, scene, state, jnp.array(action, jnp.float32))
    return state


def test_collision_against_dense_samples_of_the_move():
    rng = np.random.default_rng(2)
    hits = 0
    jitted = jax.jit(functools.partial(step, CONFIG))
    for _ in range(200):
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.13)
        start = np.array([0.32, 0.3]) + distance * np.array([np.cos(angle), np.sin(angle)])
        scene = a_scene(start=jnp.asarray(start, jnp.float32))
        velocity = rng.uniform(-0.3, 0.3, 2)
        state = jitted(scene, initial_state(scene), jnp.array([*velocity, 0.0]))
        executed = 0.1 * velocity * min(1, 0.25 / np.linalg.norm(velocity))
        np.testing.assert_allclose(state.position, start + executed, atol=1e-6)
        dense = start + np.linspace(0, 1, 1001)[:, None] * executed
        room = np.linalg.norm(dense - [0.32, 0.3], axis=1).min() - 0.10
        if abs(room) > 1e-5:
            assert bool(state.collision) == (room < 0) == bool(state.done)
            assert not state.success
            hits += room < 0
    assert 20 < hits < 180


def test_fast_grazing_is_a_collision_although_both_ends_are_free():
    # Two centimetres in one step at a chord that dips under the sum of the radii (0.1 m) only in its middle.
    height = float(np.sqrt(0.1**2 - 0.005**2))
    state = play(a_scene(start=jnp.array([0.31, 0.3 + height])), [[0.2, 0, 0]])
    assert np.linalg.norm(np.asarray(state.position) - [0.32, 0.3]) > 0.1 and state.collision


def test_grasping_takes_three_steps_and_ends_the_episode_at_the_named_object():
    at_target = a_scene(start=jnp.array([0.32, 0.53]))
    state = play(at_target, [[0, 0, 1]] * 2)
    assert not state.done and 0 < state.opening < 1
    state = play(at_target, [[0, 0, 1]] * 3)
    assert state.done and state.success and state.reached == 1 and state.opening == 0
    state = play(a_scene(start=jnp.array([0.48, 0.5])), [[0, 0, 1]] * 3)
    assert state.done and not state.success and state.reached == 2


def test_closing_on_nothing_neither_ends_nor_sweeps_up_objects():
    beside = a_scene(start=jnp.array([0.32, 0.50]))
    state = play(beside, [[0, 0, 1]] * 3 + [[0, 0.2, 1]] * 3)
    assert not state.done and state.reached == NOTHING
    assert np.linalg.norm(np.asarray(state.position) - [0.32, 0.55]) < CONFIG.grasp_radius_m
    state = play(beside, [[0, 0, 1]] * 3 + [[0, 0.2, 1]] * 3 + [[0, 0, 0], [0, 0, 1]])
    assert state.success


def test_time_runs_out_and_what_is_done_stays():
    scene = a_scene()
    state = play(scene, [[0.05, 0, 0]] * CONFIG.max_steps)
    assert state.done and not state.success and not state.collision and state.steps == CONFIG.max_steps
    later = step(CONFIG, scene, state, jnp.array([-0.2, 0.1, 1.0]))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(later)))


def test_the_gripper_stays_on_the_table():
    state = play(a_scene(start=jnp.array([0.03, 0.03])), [[-0.2, -0.2, 0]] * 3)
    np.testing.assert_allclose(state.position, CONFIG.gripper_radius_m)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind_weights": (0.0, 0.0, 0.0)}, "positive sum"),
        ({"object_gap_m": 0.3}, "no room"),
        ({"obstacle_y_m": (0.2, 0.3)}, "detour"),
        ({"obstacle_y_m": (0.3, 0.45)}, "detour"),
        ({"start_x_m": (0.5, 0.4)}, "start_x_m"),
        ({"gripper_rate": 0.0}, "gripper_rate"),
        ({"hold_radius_m": 0.06}, "order"),
        ({"max_steps": 0}, "at least 1"),
        ({"noisy_fraction": 1.5}, "is a probability"),
    ],
)
def test_impossible_tables_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TabletopConfig(**changes)
