import numpy as np
import pytest

from vla_jax.flow.config import SolverConfig
from vla_jax.sim import evaluate, evaluate_metaworld, metrics
from vla_jax.sim.metaworld import MetaWorldEnv, find_task
from vla_jax.sim.metaworld.demos import expert_action

pytest.importorskip("metaworld")

TASKS = ("button-press-v3", "drawer-open-v3")
STEPS = 130


class Listening:
    """MetaWorld's experts where the task's own instruction is given, standing still otherwise."""

    horizon, execute = 1, 1
    writes_plans = sees_plans = False
    action_scale = np.ones(4)

    def __init__(self):
        self.tracked: list[MetaWorldEnv] = []

    def act(self, observation, key, *, solver, plan=None, plan_visible=False, samples=1):
        env = self.tracked[-1]
        actions = []
        for picture, instruction in zip(observation.images["corner2"], observation.instruction):
            # All arms start alike; the pictures tell the scenes apart.
            away = np.abs(env._images.astype(int) - picture).sum(axis=(1, 2, 3))
            assert away.min() == 0
            simulator = env._simulators[int(away.argmin())]
            own = instruction == find_task(simulator.task.name).instruction
            expert = simulator.expert()
            actions.append(expert_action(expert, simulator.observation) if own else np.zeros(4))
        chunk = np.array(actions)[:, None]
        return chunk if samples == 1 else np.repeat(chunk[:, None], samples, axis=1)


def test_success_per_task_and_group_and_under_the_wrong_instruction(monkeypatch):
    policy, made = Listening(), []

    class Tracked(MetaWorldEnv):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            policy.tracked.append(self)
            made.append(kwargs.get("instruction", "own"))

    monkeypatch.setattr("vla_jax.sim.metaworld.simulator.MAX_STEPS", STEPS)
    monkeypatch.setattr(evaluate_metaworld, "MetaWorldEnv", Tracked)
    config = evaluate.EvaluateConfig(episodes=2, execute=1, samples=2, latency_calls=2, record=2)
    result = evaluate_metaworld.evaluate_metaworld(policy, TASKS, config, SolverConfig(), image_size=16)
    report = result.report
    assert report["episodes"] == 4 and report["success"] == 1.0 and report["chunk_diversity"] == 0.0
    assert report["success_ci"] == list(metrics.wilson(4, 4))
    assert list(report["per_task"]) == list(TASKS)
    assert report["per_task"][TASKS[0]]["episodes"] == 2
    assert report["details"]["per_group"]["easy"]["tasks"] == 2
    assert report["details"]["wrong_instruction_success"] == 0.0
    assert made == ["own", TASKS[1], "own", TASKS[0]]
    absent = {
        "collision",
        "left_share",
        "path_error",
        "swapped_success",
        "plan_accuracy",
        "forced_plan_followed",
    }
    assert not absent & set(report)
    assert len(result.rollout.recordings) == 2  # one of each task
    assert [r.record["task"] for r in result.rollout.recordings] == list(TASKS)
    seeds = {record["seed"] for record in result.rollout.records}
    assert seeds == set(config.seeds())


def test_no_task_is_refused():
    with pytest.raises(ValueError, match="at least one MetaWorld task"):
        evaluate_metaworld.evaluate_metaworld(Listening(), (), evaluate.EvaluateConfig(), SolverConfig())
