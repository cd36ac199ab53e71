import dataclasses

import jax
import numpy as np
import pytest

from vla_jax.serve.executors import ExecutorConfig, RecedingHorizon
from vla_jax.types import Observation

SOLVER = object()  # the executor only hands it on


def observe(position: np.ndarray) -> Observation:
    robots = len(position)
    return Observation(
        images={"top": np.zeros((robots, 4, 4, 3), np.uint8)},
        state=position.astype(np.float32),
        instruction=("go",) * robots,
    )


@dataclasses.dataclass
class CountingPolicy:
    """Predicts the absolute index of each step since the last look, and remembers how it was asked."""

    horizon: int = 6
    calls: list = dataclasses.field(default_factory=list)

    def plan(self, observation, key):
        self.calls.append(("plan", jax.random.key_data(key).tolist()))
        return [f"plan {i}" for i in range(len(observation.instruction))]

    def act(self, observation, key, *, solver, plan=None, see_plan=False):
        assert solver is SOLVER
        self.calls.append(("act", jax.random.key_data(key).tolist(), plan, see_plan))
        return observation.state[:, None, :] + np.arange(1, self.horizon + 1)[None, :, None]


def drive(executor: RecedingHorizon, robots: int, rounds: int) -> np.ndarray:
    """Runs position ← action and returns all the executed actions, [b rounds·K a]."""
    position, executed = np.zeros((robots, 1)), []
    executor.reset(observe(position))
    for _ in range(rounds):
        actions = executor(observe(position))
        position = actions[:, -1]
        executed.append(actions)
    return np.concatenate(executed, axis=1)


@pytest.mark.parametrize("execute", [1, 4, 6])
def test_executed_steps_are_contiguous(execute):
    executor = RecedingHorizon(
        CountingPolicy(), ExecutorConfig(execute=execute), solver=SOLVER, key=jax.random.key(0)
    )
    actions = drive(executor, robots=3, rounds=5)
    expected = np.arange(1, 5 * execute + 1)
    np.testing.assert_array_equal(actions[..., 0], np.broadcast_to(expected, (3, 5 * execute)))


def test_each_prediction_has_its_own_noise_and_an_episode_can_be_repeated():
    policy = CountingPolicy()
    executor = RecedingHorizon(policy, ExecutorConfig(execute=2), solver=SOLVER, key=jax.random.key(7))
    drive(executor, robots=1, rounds=4)
    first = [call[1] for call in policy.calls]
    assert len({str(key) for key in first}) == 4
    policy.calls.clear()
    drive(executor, robots=1, rounds=4)
    assert [call[1] for call in policy.calls] == first


def test_plan_is_decoded_once_held_and_shown():
    policy = CountingPolicy()
    config = ExecutorConfig(execute=2, see_plan=True)
    executor = RecedingHorizon(policy, config, solver=SOLVER, key=jax.random.key(0))
    drive(executor, robots=2, rounds=3)
    assert [call[0] for call in policy.calls] == ["plan", "act", "act", "act"]
    assert all(call[2:] == (["plan 0", "plan 1"], True) for call in policy.calls[1:])
    assert len({str(call[1]) for call in policy.calls}) == 4


def test_without_see_plan_nothing_is_decoded_and_a_forced_plan_is_shown_anyway():
    policy = CountingPolicy()
    executor = RecedingHorizon(policy, ExecutorConfig(execute=2), solver=SOLVER, key=jax.random.key(0))
    drive(executor, robots=2, rounds=2)
    assert all(call[0] == "act" and call[2:] == (None, False) for call in policy.calls)
    executor.reset(observe(np.zeros((2, 1))), plan=["a", "b"])
    executor(observe(np.zeros((2, 1))))
    assert policy.calls[-1][2:] == (["a", "b"], True)
    executor.reset(observe(np.zeros((2, 1))))
    executor(observe(np.zeros((2, 1))))
    assert policy.calls[-1][2:] == (None, False)


def test_only_active_robots_are_computed_and_each_keeps_its_own_plan():
    policy = CountingPolicy()
    executor = RecedingHorizon(policy, ExecutorConfig(execute=2), solver=SOLVER, key=jax.random.key(0))
    observation = observe(np.array([[10.0], [20.0], [30.0]]))
    executor.reset(observation, plan=["a", "b", "c"])
    actions = executor(observation, active=np.array([True, False, True]))
    np.testing.assert_array_equal(actions[..., 0], [[11, 12], [0, 0], [31, 32]])
    assert policy.calls[-1][2] == ["a", "c"]


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ExecutorConfig(execute=0)
    with pytest.raises(ValueError, match="use --execute 6 or less"):
        RecedingHorizon(CountingPolicy(), ExecutorConfig(execute=7), solver=SOLVER, key=jax.random.key(0))
    executor = RecedingHorizon(
        CountingPolicy(horizon=8), ExecutorConfig(), solver=SOLVER, key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match="1 plans for 2 robots"):
        executor.reset(observe(np.zeros((2, 1))), plan=["a"])
