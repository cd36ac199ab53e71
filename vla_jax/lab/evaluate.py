"""What became of a cell: its last validation and, on the tabletop, episodes in closed loop."""

import math
from pathlib import Path
from typing import Any

import jax

from vla_jax.files import read_lines
from vla_jax.serve.policy import Policy
from vla_jax.sim.evaluate import EvaluateConfig
from vla_jax.sim.evaluate_tabletop import evaluate_tabletop
from vla_jax.sim.tabletop import TabletopConfig, TabletopEnv, parse_plan

KEPT = (
    "episodes", "success", "success_ci", "collision", "chunk_diversity", "swapped_success", "plan_accuracy",
    "forced_plan_followed", "left_share",
)  # fmt: skip
"""What is kept of the tabletop's report."""


def last_validation(folder: Path, step: int, *, missing: bool = False) -> dict[str, Any]:
    """The validation of the last step in a cell's metrics.jsonl, without the prefix ``val/``.

    Raises ValueError where there is none, unless that may be `missing`, as where training ended before its time.
    """
    lines = read_lines(folder / "metrics.jsonl")
    found = [line for line in lines if line["step"] == step and any(k.startswith("val/") for k in line)]
    if not found and missing:
        return {}
    if not found:
        raise ValueError(
            f"{folder}/metrics.jsonl has no validation of step {step}; delete the folder and sweep again"
        )
    return {k.removeprefix("val/"): v for k, v in found[-1].items() if k.startswith("val/")}


def closed_loop(policy: Policy, episodes: int) -> dict[str, Any] | None:
    """Success, instruction following, plans and diversity on held-out scenes; None where there is no simulator.

    All cells get the same scenes. A policy trained with λ = 0 has no actions: only its plans are judged.
    """
    if policy.bundle.schema.robot != "tabletop" or not episodes:
        return None
    tabletop = TabletopConfig(image_size=policy.bundle.schema.cameras["top"][0])
    config = EvaluateConfig(
        episodes=episodes,
        execute=max(1, policy.horizon // 2),
        samples=8,
        latency_calls=1,
        record=0,
    )
    if policy.config.objective.action_weight == 0:
        return {"episodes": episodes, "plan_accuracy": _plan_accuracy(policy, config, tabletop)}
    report = evaluate_tabletop(policy, config, policy.config.solver, env_config=tabletop).report
    return {name: report[name] for name in KEPT if name in report}


def _plan_accuracy(policy: Policy, config: EvaluateConfig, tabletop: TabletopConfig) -> float:
    env = TabletopEnv(tabletop)
    decoded = policy.plan(env.reset(config.seeds()), jax.random.key(config.seed))
    right = [parse_plan(text)[1] == parse_plan(plan)[1] for text, plan in zip(decoded, env.plans)]
    return math.fsum(right) / len(right)
