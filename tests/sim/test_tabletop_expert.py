"""The expert reaches everything, hits nothing, and takes each side equally often where both are equal."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.sim.tabletop import KINDS, TabletopConfig, generate
from vla_jax.sim.tabletop.demos import _rollouts
from vla_jax.sim.tabletop.episode import expert_path, kind_weights, measure, sample_episode
from vla_jax.sim.tabletop.expert import expert_action, rollout, sample_disturbance
from vla_jax.sim.tabletop.geometry import detour
from vla_jax.sim.tabletop.world import clearance, initial_state, sample_scene

CLEAN = TabletopConfig(noisy_fraction=0.0)
NOISY = TabletopConfig(noisy_fraction=1.0)
N = 1024


@functools.cache
def rollouts(config, scattered=False):
    seeds = np.arange(N, dtype=np.uint32)
    return jax.tree.map(np.asarray, _rollouts(config, seeds, config.kind_weights, False, scattered))


@pytest.mark.parametrize("config, success, longest", [(CLEAN, 0.999, 32), (NOISY, 0.99, 60)])
def test_expert_succeeds_without_collision(config, success, longest):
    _, run, track = rollouts(config)
    assert run.final.success.mean() >= success
    assert not run.final.collision.any()
    assert track.min_clearance_m.min() > config.burst_clearance_m - 1e-5
    assert run.final.steps.max() <= longest
    assert 20 <= np.median(run.final.steps) <= 30


def test_scattered_starts_lie_everywhere_and_are_left_without_collision():
    episodes, run, track = rollouts(CLEAN, scattered=True)
    start, scene = episodes.scene.start, episodes.scene
    assert run.final.success.mean() >= 0.995 and not run.final.collision.any()
    assert track.min_clearance_m.min() > 0
    from_obstacle = np.linalg.norm(start - scene.obstacle, axis=1)
    assert (from_obstacle > CLEAN.detour_radius_m(scene.obstacle_radius)).all()
    cells = np.histogram2d(*start.T, bins=4, range=[[0, CLEAN.table_m]] * 2)[0]
    border = np.delete(cells.ravel(), [5, 6, 9, 10])  # the obstacle lies in the middle
    assert border.min() > N / 16 / 2 and cells.sum() == N
    towards = np.abs(np.corrcoef(start[:, 0], np.asarray(jax.vmap(lambda s: s.goal)(scene))[:, 0])[0, 1])
    assert towards < 4 / np.sqrt(N), "where the gripper starts says nothing of where it goes"


def test_sides_are_a_fair_coin_where_equal_and_the_shorter_way_elsewhere():
    episodes, _, track = rollouts(CLEAN)
    scene = episodes.scene
    goal = jax.vmap(lambda s: s.goal)(scene)
    ways = jax.vmap(detour)(scene.start, goal, scene.obstacle, CLEAN.detour_radius_m(scene.obstacle_radius))
    symmetric, asymmetric, _ = (episodes.kind == index for index in range(3))
    np.testing.assert_allclose(ways.left[symmetric], ways.right[symmetric], atol=1e-5)
    assert (abs(ways.left - ways.right)[asymmetric] > 0.04).all()
    assert ((track.side == -1) == (ways.left < ways.right))[asymmetric].all()
    lefts, count = (track.side[symmetric] == -1).sum(), symmetric.sum()
    assert abs(lefts - count / 2) < 4 * np.sqrt(count) / 2
    assert (track.side == episodes.side)[symmetric | asymmetric].all()


def test_paths_are_as_long_as_the_closed_form():
    episodes, _, track = rollouts(CLEAN)
    scene = episodes.scene
    goal = jax.vmap(lambda s: s.goal)(scene)
    ways = jax.vmap(detour)(scene.start, goal, scene.obstacle, CLEAN.detour_radius_m(scene.obstacle_radius))
    closed_form = np.where(episodes.side == -1, ways.left, ways.right)
    ratio = (track.path_length_m + CLEAN.close_radius_m) / closed_form  # it stops within that
    assert ratio.min() > 0.98 and ratio.max() < 1.06
    assert track.path_error_m.max() < 1e-6


@pytest.mark.parametrize("side", [-1, 1])
def test_either_side_can_be_forced_and_shows_from_the_first_step(side):
    episodes, _, _ = rollouts(CLEAN)
    rows = np.flatnonzero(episodes.kind != KINDS.index("clear"))[:200]
    episodes = jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), episodes)

    def one(episode):
        run = rollout(CLEAN, episode.scene, jnp.array(side), jnp.zeros((CLEAN.max_steps, 2)))
        return run, measure(CLEAN, episode, run.positions, run.final.steps)

    run, track = jax.jit(jax.vmap(one))(episodes)
    assert run.final.success.all() and (track.side == side).all()
    np.testing.assert_allclose(track.path_error_m, 0, atol=1e-6)
    # The first action leaves the straight line to the goal on the side taken, clearly so where both are equal.
    first = np.asarray(run.actions[:, 0, :2])
    line = np.asarray(jax.vmap(lambda s: s.goal - s.start)(episodes.scene))
    turn = np.arctan2(first[:, 1], first[:, 0]) - np.arctan2(line[:, 1], line[:, 0])
    assert (-side * turn > np.radians(3)).all()
    assert (-side * turn > np.radians(20))[episodes.kind == KINDS.index("symmetric")].all()


def test_labels_are_the_clean_actions_of_disturbed_states():
    episodes, run, _ = rollouts(NOISY)
    act = jax.vmap(jax.vmap(functools.partial(expert_action, NOISY), in_axes=(None, 0, None)))
    again = np.asarray(jax.jit(act)(episodes.scene, run.states, episodes.side))
    np.testing.assert_allclose(run.actions, again, atol=2e-3)  # the tangent's √(1 - sin²) in float32
    executed = (
        np.diff(np.concatenate([run.states.position, run.final.position[:, None]], 1), axis=1) / NOISY.dt_s
    )
    gap = np.linalg.norm(executed - run.actions[..., :2], axis=-1)
    live = np.arange(NOISY.max_steps) < run.final.steps[:, None]
    disturbed = (gap > 0.01) & live
    assert 0.1 < disturbed.sum() / live.sum() < 0.35
    assert (np.linalg.norm(executed, axis=-1) <= NOISY.max_speed_m_per_s + 1e-5).all()


def test_noisy_fraction_is_the_share_of_disturbed_episodes():
    config = TabletopConfig(noisy_fraction=0.25)
    disturbance = jax.vmap(lambda seed: sample_disturbance(config, jax.random.key(seed)))(np.arange(N))
    share = (np.abs(disturbance).max((1, 2)) > 0).mean()
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / N)


def test_from_inside_the_margin_the_expert_moves_out():
    scene = sample_scene(CLEAN, jax.random.key(0), jnp.array(KINDS.index("symmetric")))
    touching = scene.obstacle_radius + CLEAN.gripper_radius_m + 0.001
    for angle in np.linspace(-np.pi, 0, 9):
        position = scene.obstacle + touching * jnp.array([np.cos(angle), np.sin(angle)])
        state = dataclasses.replace(initial_state(scene), position=position)
        velocity = expert_action(CLEAN, scene, state, jnp.array(1))[:2]
        after = position + CLEAN.dt_s * velocity
        assert clearance(CLEAN, scene, position, after) > 0
        assert clearance(CLEAN, scene, after, after) > 0.005


def test_path_error_of_a_shifted_path_is_the_shift():
    episode = sample_episode(CLEAN, jnp.uint32(3), kind_weights(CLEAN, "clear"), False)
    path = expert_path(CLEAN, episode.scene, episode.side)
    along = episode.scene.goal - episode.scene.start
    normal = jnp.array([-along[1], along[0]]) / jnp.linalg.norm(along)
    track = measure(CLEAN, episode, path + 0.01 * normal, jnp.array(15))
    np.testing.assert_allclose(track.path_error_m, 0.01, rtol=1e-3)


def test_demonstrations_are_functions_of_their_seed_alone():
    config = TabletopConfig()
    first, second = generate(config, [5, 6, 7, 8]), generate(config, [7, 1, 2, 3])
    n = int(second.lengths[0])
    assert first.lengths[2] == n and first.records[2] == second.records[0]
    assert first.instructions[2] == second.instructions[0] and first.plans[2] == second.plans[0]
    np.testing.assert_array_equal(first.actions[2, :n], second.actions[0, :n])
    np.testing.assert_array_equal(first.state[2, :n], second.state[0, :n])
    for camera, pictures in first.images.items():
        np.testing.assert_array_equal(pictures[2, :n], second.images[camera][0, :n])
        assert pictures[2, :n].any((1, 2, 3)).all() and not pictures[2, n:].any(), "padding is black"
