"""The tabletop as a VectorEnv: its contract, its language, and what it reports."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_jax.sim.tabletop import (
    KINDS,
    TabletopConfig,
    TabletopEnv,
    generate,
    parse_plan,
    plan_text,
    with_side,
)
from vla_jax.sim.tabletop.language import PHRASINGS, instruction_text, object_name
from vla_jax.sim.tabletop.render import OBSTACLE

CONFIG = TabletopConfig(noisy_fraction=0.0)
NAMES = [object_name(colour, shape) for colour in range(4) for shape in range(3)]


def run_expert(env, seeds):
    env.reset(seeds)
    while not env.done.all():
        env.advance(env.expert_actions()[:, None])
    return env.results()


def test_replayed_demonstrations_succeed_and_look_the_same():
    demos = generate(CONFIG, range(16), swapped=False, scattered=False)
    env = TabletopEnv(CONFIG)
    observation = env.reset(range(16))
    assert observation.instruction == demos.instructions and env.plans == demos.plans
    for t in range(5):
        np.testing.assert_allclose(observation.state, demos.state[:, t], atol=1e-5)
        for camera in ("top", "wrist"):
            gap = observation.images[camera].astype(int) - demos.images[camera][:, t]
            assert np.abs(gap).max() <= 1
        observation = env.advance(demos.actions[:, t : t + 1])
    env.advance(demos.actions[:, 5:])
    for ours, theirs in zip(env.results(), demos.records):
        assert ours.keys() == theirs.keys() and json.dumps(ours)
        for key, value in theirs.items():
            assert ours[key] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value)
        assert ours["success"] and ours["reached"] == ours["target"] == ours["own_target"]
        assert ours["time_s"] == pytest.approx(ours["steps"] * 0.1)


def test_a_chunk_is_its_steps_one_by_one():
    actions = np.random.default_rng(0).uniform([-0.2, 0, 0], [0.2, 0.3, 1], (16, 12, 3)).astype(np.float32)
    whole, single = TabletopEnv(CONFIG), TabletopEnv(CONFIG)
    whole.reset(range(16))
    single.reset(range(16))
    at_once = whole.advance(actions)
    for t in range(12):
        stepwise = single.advance(actions[:, t : t + 1])
    np.testing.assert_allclose(at_once.state, stepwise.state, atol=1e-6)
    np.testing.assert_allclose(whole.positions, single.positions, atol=1e-6)
    np.testing.assert_array_equal(whole.done, single.done)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(single.state)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_finished_episodes_stay_as_they_are():
    env = TabletopEnv(CONFIG)
    before = run_expert(env, range(16))
    seen = env.observe()
    after = env.advance(np.full((16, 1, 3), 0.2, np.float32))
    assert env.results() == before
    np.testing.assert_array_equal(seen.state, after.state)
    for camera in seen.images:
        np.testing.assert_array_equal(seen.images[camera], after.images[camera])


def test_driving_straight_in_a_symmetric_scene_is_a_collision():
    env = TabletopEnv(CONFIG, kind="symmetric")
    env.reset(range(16))
    scene = env.episodes.scene
    goal = np.asarray(scene.objects)[np.arange(16), np.asarray(scene.target)]
    line = goal - np.asarray(scene.start)
    velocity = 0.25 * line / np.linalg.norm(line, axis=1, keepdims=True)
    actions = np.concatenate([velocity, np.zeros((16, 1))], 1)[:, None].repeat(30, 1)
    env.advance(actions)
    for record in env.results():
        assert record["collision"] and not record["success"] and record["min_clearance_m"] < 0
        assert record["kind"] == "symmetric" and record["side"] is None and record["reached"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_can_be_asked_for(kind):
    records = run_expert(TabletopEnv(CONFIG, kind=kind), range(16))
    assert {record["kind"] for record in records} == {kind} and all(record["success"] for record in records)
    assert all((record["side"] is None) == (kind == "clear") for record in records)


def test_swapped_instructions_name_and_judge_another_object_of_the_same_scene():
    own, swapped = TabletopEnv(CONFIG), TabletopEnv(CONFIG, instruction="swapped")
    seeds = range(16)
    first, second = own.reset(seeds), swapped.reset(seeds)
    np.testing.assert_array_equal(first.images["top"], second.images["top"])
    records = run_expert(swapped, seeds)
    for index, (record, other) in enumerate(zip(records, own.results())):
        assert record["own_target"] == other["target"] != record["target"]
        assert record["target"] in swapped.instructions[index]
        assert record["target"] in swapped.scene_summary(index)["objects"]
        assert record["success"] and record["reached"] == record["target"]
    # The expert for the own target ends at the own target, which is now a failure.
    run_expert(own, seeds)
    demos = generate(CONFIG, seeds, swapped=False, scattered=False)
    swapped.reset(seeds)
    swapped.advance(demos.actions)
    for record in swapped.results():
        assert record["reached"] == record["own_target"] and not record["success"]
    other = generate(CONFIG, seeds, swapped=True, scattered=False)
    assert other.instructions == swapped.instructions and other.plans == swapped.plans
    assert all(record["success"] and record["target"] != record["own_target"] for record in other.records)


def test_kinds_are_drawn_with_their_weights():
    env = TabletopEnv(TabletopConfig(kind_weights=(1.0, 2.0, 1.0)))
    env.reset(range(2048))
    counts = np.bincount(env.episodes.kind, minlength=3)
    np.testing.assert_allclose(counts / 2048, [0.25, 0.5, 0.25], atol=0.04)


def test_plans_say_what_the_expert_does():
    env = TabletopEnv(CONFIG)
    for record, plan in zip(run_expert(env, range(16)), env.plans):
        assert parse_plan(plan) == (record["side"], record["target"])


def test_pixels_point_at_what_they_name():
    env = TabletopEnv(CONFIG)
    observation = env.reset(range(16))
    column, row = env.to_pixels(env.episodes.scene.obstacle).T
    centres = observation.images["top"][np.arange(16), row.astype(int), column.astype(int)]
    assert (np.abs(centres.astype(int) - OBSTACLE) <= 1).all()
    np.testing.assert_allclose(env.to_pixels(np.array([[0, 0.64], [0.64, 0]])), [[0, 0], [64, 64]])


@given(st.sampled_from([None, "left", "right"]), st.sampled_from(NAMES), st.text(max_size=10))
def test_plans_survive_parsing(side, name, noise):
    assert parse_plan(plan_text(side, name)) == (side, name)
    assert parse_plan(plan_text(side, name, 0.33)) == (side, name)
    assert with_side(plan_text(side, name, 0.5), "left") == plan_text(side and "left", name, 0.5)
    assert parse_plan(f"{noise} {plan_text(side, name)} ")[1] == name


def test_plans_say_first_where_the_object_lies():
    assert plan_text(None, "red cup", 0.374) == "35 cm: go straight, then grasp the red cup"
    env = TabletopEnv(CONFIG)
    env.reset(range(64))
    scene = jax.tree.map(np.asarray, env.episodes.scene)
    x = np.take_along_axis(scene.objects[..., 0], scene.target[:, None], axis=1)[:, 0]
    said = np.array([float(plan.split(" cm: ")[0]) / 100 for plan in env.plans])
    assert np.abs(said - x).max() <= 0.0251


@given(st.text())
def test_any_text_can_be_parsed(text):
    side, name = parse_plan(text)
    assert side in (None, "left", "right") and (name is None or name in NAMES)


def test_half_a_plan_names_half():
    assert parse_plan("pass left of the") == ("left", None)
    assert parse_plan("go straight, then grasp the red red") == (None, None)
    assert parse_plan("bypass left, grasp the green ball") == (None, "green ball")
    with pytest.raises(ValueError, match="up"):
        plan_text("up", "red cup")


def test_every_phrasing_occurs_and_names_the_object():
    env = TabletopEnv(CONFIG)
    env.reset(range(256))
    heard = set()
    for index, sentence in enumerate(env.instructions):
        target = env.scene_summary(index)["target"]
        heard.add(sentence.replace(target, "{}"))
    assert heard == set(PHRASINGS) and len(PHRASINGS) >= 6
    assert instruction_text(0, "red cup") == "pick up the red cup"


def test_mistakes_are_told():
    env = TabletopEnv(CONFIG)
    with pytest.raises(ValueError, match="symmetric"):
        TabletopEnv(CONFIG, kind="round")
    with pytest.raises(ValueError, match="swapped"):
        TabletopEnv(CONFIG, instruction="other")
    with pytest.raises(ValueError, match="non-empty"):
        env.reset([])
    with pytest.raises(ValueError, match="-1"):
        env.reset([-1, 2])
    env.reset([0, 1])
    with pytest.raises(ValueError, match="k, 3"):
        env.advance(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="NaN"):
        env.advance(np.full((2, 1, 3), np.nan))
