import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.sim import scripted
from vla_jax.files import write_json
from vla_jax.flow.config import SolverConfig
from vla_jax.sim import evaluate, evaluate_tabletop
from vla_jax.sim.sources import EVALUATION_SEEDS_FROM

KEYS = {
    "episodes", "success", "success_ci", "collision", "left_share", "path_error", "path_length_m", "time_s",
    "chunk_diversity", "latency_ms_p50", "latency_ms_p95", "swapped_success", "plan_accuracy",
    "forced_plan_followed", "per_task", "config", "solver", "seed", "details",
}  # fmt: skip
CONFIG = evaluate.EvaluateConfig(
    episodes=48, execute=8, samples=3, diversity_scenes=2, latency_calls=2, record=4
)


@pytest.fixture(autouse=True)
def tracked(monkeypatch):
    monkeypatch.setattr(evaluate_tabletop, "TabletopEnv", scripted.TrackedTabletop)
    scripted.TRACKED.clear()


def run(policy, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return evaluate_tabletop.evaluate_tabletop(policy, config, SolverConfig())


def test_the_expert_is_perfect_in_every_respect(tmp_path):
    result = run(scripted.ExpertPolicy())
    report = result.report
    assert set(report) == KEYS
    assert (report["episodes"], report["success"], report["collision"]) == (48, 1.0, 0.0)
    assert report["swapped_success"] == report["plan_accuracy"] == report["forced_plan_followed"] == 1.0
    assert report["path_error"] < 1e-3 and report["chunk_diversity"] == 0.0
    records = result.rollout.records
    assert report["path_length_m"] == np.mean([r["path_length_m"] for r in records]) > 0.1
    assert report["time_s"] == np.mean([r["time_s"] for r in records]) > 1
    assert 0.2 < report["left_share"] < 0.8
    assert report["per_task"]["tabletop"]["success"] == 1.0
    symmetric = [r for r in result.rollout.records if r["kind"] == "symmetric"]
    assert report["details"]["symmetric_episodes"] == len(symmetric) > 5
    assert report["left_share"] == np.mean([r["side"] == "left" for r in symmetric])
    write_json(report, tmp_path / "sub" / "report.json")
    assert json.loads((tmp_path / "sub" / "report.json").read_text()) == report
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["report.json"]


def test_a_policy_that_does_not_listen_is_found_out():
    report = run(scripted.ExpertPolicy(deaf=True)).report
    assert report["success"] == 1.0
    assert report["swapped_success"] == 0.0


def test_a_policy_that_ignores_plans_follows_about_half_of_the_forced_ones():
    class Stubborn(scripted.ExpertPolicy):
        def act(self, observation, key, *, solver, plan=None, plan_visible=False, samples=1):
            return super().act(observation, key, solver=solver, samples=samples)

    report = run(Stubborn()).report
    assert report["success"] == 1.0
    assert 0.2 < report["forced_plan_followed"] < 0.8


def test_policies_without_plans_have_no_plan_keys_and_refuse_plan_visible():
    class Silent(scripted.ExpertPolicy):
        writes_plans = sees_plans = False

    assert set(run(Silent()).report) == KEYS - {"plan_accuracy", "forced_plan_followed"}
    with pytest.raises(ValueError, match="leave --plan-visible out"):
        run(Silent(), plan_visible=True)


def test_plan_visible_reaches_every_prediction():
    policy = scripted.ExpertPolicy()
    report = run(policy, plan_visible=True).report
    assert report["success"] == 1.0
    assert all(see for _, see, samples in policy.asked if samples == 1)


def test_recordings_end_with_the_episode():
    result = run(scripted.ExpertPolicy()).rollout
    assert len(result.recordings) == 4
    for recording, record in zip(result.recordings, result.records):
        assert recording.record == record
        assert len(recording.frames) == len(recording.seconds) == -(-record["steps"] // CONFIG.execute) + 1
        assert recording.seconds[-1] == record["time_s"]
        assert not np.array_equal(recording.frames[0], recording.frames[-1])


def test_finished_episodes_cost_nothing():
    policy = scripted.ExpertPolicy()
    result = run(policy)
    calls = [rows for rows, _, samples in policy.asked if samples == 1][CONFIG.latency_calls + 3 :]
    own = calls[: max(-(-r["steps"] // CONFIG.execute) for r in result.rollout.records)]
    assert sum(own) == sum(-(-r["steps"] // CONFIG.execute) for r in result.rollout.records)


def test_progress_counts_every_episode():
    seen = {}

    def progress(name, total, ended):
        seen[name] = seen.get(name, 0) + ended

    evaluate_tabletop.evaluate_tabletop(scripted.ExpertPolicy(), CONFIG, SolverConfig(), progress=progress)
    assert seen["own instruction"] == seen["swapped instruction"] == 48


def test_seeds_are_held_out_and_distinct():
    first = evaluate.EvaluateConfig(seed=0, episodes=100).seeds()
    second = evaluate.EvaluateConfig(seed=1, episodes=100).seeds()
    assert len({*first, *second}) == 200 and min(first) >= EVALUATION_SEEDS_FROM
    assert max(evaluate.EvaluateConfig(seed=4292, episodes=evaluate.SEEDS_APART).seeds()) < 2**32
    for wrong in ({"seed": -1}, {"seed": 4293}, {"episodes": 0}, {"samples": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            evaluate.EvaluateConfig(**wrong)


def test_pieces_are_nearly_equal_and_keep_the_order():
    pieces = evaluate.pieces_of(list(range(10)), 4)
    assert [len(piece) for piece in pieces] == [4, 3, 3]
    assert [seed for piece in pieces for seed in piece] == list(range(10))


def test_an_episodes_noise_is_its_own_whatever_runs_beside_it():
    """By seed and step: other episodes, their order, the pieces and the other uses do not change it."""
    one, other = (
        evaluate.Runner(scripted.ExpertPolicy(), config, SolverConfig(), evaluate.silent)
        for config in (CONFIG, dataclasses.replace(CONFIG, execute=2))
    )
    data = jax.random.key_data(one.episode_keys("episodes", [1_000_007, 1_000_003, 1_000_005]))
    other.key("plans")
    np.testing.assert_array_equal(
        jax.random.key_data(other.episode_keys("episodes", [1_000_005, 1_000_007])), data[np.array([2, 0])]
    )
    assert len({str(row) for row in data.tolist()}) == 3
    uses = ("episodes", "plans", "diversity", "latency")
    assert len({str(jax.random.key_data(one.key(use))) for use in uses}) == 4


@pytest.mark.parametrize("executor", ["receding", "async", "ensemble"])
def test_delays_reach_the_executor_and_smoothness_the_report(executor):
    """The expert bridges a delay with any executor; who stands still for it takes longer and moves by jerks."""
    reports = [run(scripted.ExpertPolicy(), executor=executor, execute=4, delay=d).report for d in (0, 3)]
    assert all(report["success"] > 0.9 for report in reports)
    jerk = [report["details"]["jerk"] for report in reports]
    if executor == "receding":
        assert jerk[1] > 2 * jerk[0]
    else:
        assert jerk[1] < 1.5 * jerk[0]
    assert reports[1]["config"]["executor"] == executor and reports[1]["config"]["delay"] == 3
    assert reports[1]["details"]["switch_jump"] > 0
