"""Converted policies on described robots: openpi's example messages in, actions in those robots' units out."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.convert import robot_examples
from tests.convert.robot_examples import CAMERAS, EXAMPLES, HORIZON, SOLVER, aloha, aloha_sim, by_hand
from vla_jax.convert import Options, PolicyOptions, convert
from vla_jax.data.robots.table import ROBOTS
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.compiled.config import CompileConfig
from vla_jax.serve.executors import Running
from vla_jax.serve.server.engine import Engine
from vla_jax.serve.server.errors import Refused
from vla_jax.serve.server.request import parse


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    robot_examples.save_theirs(folder)
    return folder


@pytest.fixture(scope="module")
def converted(theirs, tmp_path_factory):
    return robot_examples.maker(theirs, tmp_path_factory.mktemp("ours"))


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_an_example_message_gets_actions_in_the_robots_units(converted, name):
    example, plain = EXAMPLES[name], converted(name, "")
    policy = converted(name, name)
    schema = policy.bundle.schema
    assert (len(schema.state_names), len(schema.action_names)) == example.dims
    assert (schema.robot, schema.control_hz) == (name, example.hz)
    engine = Engine(policy, solver=SOLVER, buckets=(1,))
    message = example.send(np.random.default_rng(3))
    (request,), _ = parse(message, engine.spec, {})
    (answer,) = engine.run([engine.prepare(request, seed=7)])
    wanted = by_hand(plain, name, message, 7)
    assert answer.actions.shape == (HORIZON, example.dims[1]) and answer.actions.dtype == np.float32
    np.testing.assert_allclose(answer.actions, wanted, atol=2e-5)

    # What is asked of the policy in Python goes the same way, and a running chunk comes back as what it is.
    seen = engine.prepare(request, seed=7).observation
    np.testing.assert_allclose(policy.act(seen, jax.random.key(7), solver=SOLVER)[0], wanted, atol=2e-5)


def test_frames_of_a_cameras_own_size_are_taken(converted):
    """As DROID's and ALOHA's cameras give them, were the client not to resize them."""
    policy = converted("aloha", "aloha")
    engine = Engine(policy, solver=SOLVER, buckets=(1,), max_pixels=480 * 640)
    message, rng = aloha(np.random.default_rng(0)), np.random.default_rng(1)
    message["images"] = {
        name: rng.integers(256, size=(3, 48, 64), dtype=np.uint8) for name in message["images"]
    }
    (request,), _ = parse(message, engine.spec, {})
    (answer,) = engine.run([engine.prepare(request, seed=7)])
    wanted = by_hand(converted("aloha", ""), "aloha", message, 7)
    np.testing.assert_allclose(answer.actions, wanted, atol=2e-5)


def test_a_chunk_that_runs_is_continued_in_the_robots_units(converted):
    """Given in the robot's units while the robot has moved; plain and compiled keep its first actions."""
    policy = converted("aloha", "aloha")
    engine = Engine(policy, solver=SOLVER, buckets=(1,))
    (request,), _ = parse(aloha(np.random.default_rng(0)), engine.spec, {})
    seen = engine.prepare(request, seed=0).observation
    chunk = policy.act(seen, jax.random.key(1), solver=SOLVER)
    moved = dataclasses.replace(seen, state=seen.state * np.float32(0.9))
    known = policy.bundle.observation_batch(moved, None, chunk).actions
    np.testing.assert_allclose(policy.bundle.robot_actions(known, moved), chunk, atol=1e-5)

    running = Running(actions=chunk, delay=1, end=3)
    solver = SolverConfig(num_steps=5)
    plain = policy.act(moved, jax.random.key(2), solver=solver, running=running)
    compiled = policy.compiled(CompileConfig(buckets=(1,)))
    again = compiled.act(moved, jax.random.key(2), solver=solver, running=running)
    np.testing.assert_allclose(again, plain, atol=1e-4)
    free = policy.act(moved, jax.random.key(2), solver=solver)
    assert np.abs(plain - chunk)[:, 0].max() < 0.3 * np.abs(free - chunk)[:, 0].max()


def test_a_prompt_is_needed_somewhere(converted):
    policy = converted("aloha", "aloha")
    message = aloha_sim(np.random.default_rng(0))
    engine = Engine(policy, solver=SOLVER, buckets=(1,))
    with pytest.raises(Refused, match=r"prompt is missing.*--default-prompt"):
        parse(message, engine.spec, {})
    engine = Engine(policy, solver=SOLVER, buckets=(1,), default_prompt="fold the towel")
    (request,), _ = parse(message, engine.spec, {})
    assert request.prompt == "fold the towel"
    assert engine.spec.metadata()["reset_pose"] == [0, -1.5, 1.5, 0, 0, 0]


def test_cameras_that_a_robot_never_has_are_not_computed(converted):
    compiled = converted("droid", "droid").compiled(CompileConfig(buckets=(1,)))
    (shape, *_) = compiled.runner.shapes(SOLVER)
    assert [name for name, _, _ in shape.cameras] == ["base_0_rgb", "left_wrist_0_rgb"]


def test_statistics_and_cameras_that_do_not_fit_are_one_line(theirs, tmp_path):
    policy = PolicyOptions(tokenizer=theirs / "tokenizer", statistics="libero", robot="aloha")
    with pytest.raises(ValueError, match="statistics libero have 8 dims of state, robot aloha has 14"):
        convert(
            theirs / "pi0", tmp_path / "out", source="openpi", target="vla_jax",
            options=Options(horizon=HORIZON, policy=policy, cameras=CAMERAS),
        )  # fmt: skip
    policy = dataclasses.replace(policy, statistics="droid", robot="droid")
    with pytest.raises(
        ValueError, match="camera 'top' is neither filled nor absent; the robot names base_0_rgb"
    ):
        convert(
            theirs / "pi0", tmp_path / "out", source="openpi", target="vla_jax",
            options=Options(horizon=HORIZON, policy=policy, cameras=("top",)),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert set(EXAMPLES) <= set(ROBOTS)
