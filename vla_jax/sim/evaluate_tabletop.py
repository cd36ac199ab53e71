"""Evaluation on the tabletop, on held-out scenes.

The scenes' own instructions; instructions for another object in the same scenes; plans decoded at the start;
plans forced to one side in symmetric scenes; how far apart the chunks lie that are sampled there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vla_jax.data.observations import take
from vla_jax.flow.config import SolverConfig
from vla_jax.sim import metrics
from vla_jax.sim.evaluate import (
    EvaluablePolicy,
    EvaluateConfig,
    Evaluation,
    Progress,
    Runner,
    finish,
    join,
    motion_of,
    pieces_of,
    silent,
)
from vla_jax.sim.rollout import Rollout
from vla_jax.sim.tabletop import TabletopConfig, TabletopEnv, parse_plan, with_side

TABLES = 512
"""Tabletops in one batch."""


def evaluate_tabletop(
    policy: EvaluablePolicy,
    config: EvaluateConfig,
    solver: SolverConfig,
    *,
    env_config: TabletopConfig = TabletopConfig(),
    progress: Progress = silent,
) -> Evaluation:
    """Everything that is measured on the tabletop."""
    runner = Runner(policy, config, solver, progress)
    env = TabletopEnv(env_config)
    first, judged, own = _own_instructions(runner, env)
    symmetric = [record for record in own.records if record["kind"] == "symmetric"]
    arrived = [record for record in own.records if record["success"]]
    details: dict[str, Any] = motion_of(own.records) | _symmetric_details(symmetric)
    report = metrics.success_summary(own.records) | first
    report |= {
        "collision": metrics.mean_of(own.records, "collision"),
        "left_share": details.pop("left_share", None),
        "path_error": metrics.mean_of(own.records, "path_error_m"),
        # Of what ends early by colliding neither says much.
        "path_length_m": metrics.mean_of(arrived, "path_length_m"),
        "time_s": metrics.mean_of(arrived, "time_s"),
    }
    swapped_success, swapped_details = _swapped(runner, env_config)
    report["swapped_success"] = swapped_success
    details |= swapped_details
    if judged:
        report["plan_accuracy"] = metrics.mean_of(judged, "right_object")
        details["plan_side_accuracy"] = metrics.mean_of(judged, "right_side")
    if policy.writes_plans and policy.sees_plans and symmetric:
        forced = _forced(runner, env, [record["seed"] for record in symmetric])
        report["forced_plan_followed"] = float(np.mean([record["followed"] for record in forced]))
        details["forced_success"] = metrics.mean_of(forced, "success")
        details["forced_episodes"] = len(forced)
    report["per_task"] = metrics.per_task(own.records)
    return Evaluation(report=finish(report, details, runner.config, solver), rollout=own)


def _own_instructions(
    runner: Runner, env: TabletopEnv
) -> tuple[dict[str, Any], list[dict[str, Any]], Rollout]:
    """Diversity and latency at the first scenes, what the plans at the start are worth, and all episodes."""
    policy, config = runner.policy, runner.config
    report: dict[str, Any] = {}
    judged, pieces = [], []
    for seeds in pieces_of(config.seeds(), TABLES):
        observation = env.reset(seeds)
        if policy.writes_plans:
            judged += _judge_plans(env, runner.plan(observation, seeds))
        if not pieces:
            kinds = [env.scene_summary(i)["kind"] for i in range(len(seeds))]
            rows = [i for i, kind in enumerate(kinds) if kind == "symmetric"] or list(range(len(seeds)))
            few = rows[: config.diversity_scenes]
            report["chunk_diversity"] = runner.diversity(take(observation, few), [seeds[i] for i in few])
            report |= runner.latency_ms(take(observation, rows[:1]), seeds[rows[0]])
        pieces.append(runner.run("own instruction", env, seeds, record=0 if pieces else config.record))
    return report, judged, join(pieces)


def _swapped(runner: Runner, env_config: TabletopConfig) -> tuple[float, dict[str, Any]]:
    """The same scenes with an instruction for another object: share of episodes that end there, and its interval."""
    env = TabletopEnv(env_config, instruction="swapped")
    records = [
        record
        for seeds in pieces_of(runner.config.seeds(), TABLES)
        for record in runner.run("swapped instruction", env, seeds).records
    ]
    ended_there = [record["reached"] == record["target"] for record in records]
    return float(np.mean(ended_there)), {
        "swapped_ci": list(metrics.wilson(sum(ended_there), len(ended_there))),
        "swapped_collision": metrics.mean_of(records, "collision"),
    }


def _symmetric_details(symmetric: list[dict[str, Any]]) -> dict[str, Any]:
    """What the two equally good ways make of a policy."""
    if not symmetric:
        return {"symmetric_episodes": 0}
    details = {
        "symmetric_episodes": len(symmetric),
        "symmetric_success": metrics.mean_of(symmetric, "success"),
        "symmetric_collision": metrics.mean_of(symmetric, "collision"),
    }
    sides = metrics.sides(record["side"] for record in symmetric)
    if sides:
        details |= {"left_share": sides.left_share, "side_entropy_bits": sides.entropy_bits}
    return details


def _judge_plans(env: TabletopEnv, decoded: Sequence[str]) -> list[dict[str, Any]]:
    """Whether each plan names the object that is asked for and, where only one side is short, that side."""
    judged = []
    for i, text in enumerate(decoded):
        side, name = parse_plan(text)
        expert_side, expert_name = parse_plan(env.plans[i])
        either = env.scene_summary(i)["kind"] == "symmetric" and side is not None
        judged.append({"right_object": name == expert_name, "right_side": either or side == expert_side})
    return judged


def _forced(runner: Runner, env: TabletopEnv, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Forces left and right in turn; each record says in `followed` whether the episode passed there."""
    records = []
    for piece in pieces_of(seeds, TABLES):
        env.reset(piece)
        sides = ["left" if seed % 2 else "right" for seed in piece]
        plans = [with_side(plan, side) for plan, side in zip(env.plans, sides)]
        run = runner.run("forced plan", env, piece, plan=plans)
        records += [record | {"followed": record["side"] == side} for record, side in zip(run.records, sides)]
    return records
