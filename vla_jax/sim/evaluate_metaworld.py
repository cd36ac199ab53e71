"""Evaluation on MetaWorld: success per task and group, and under another task's instruction."""

from collections.abc import Sequence
from typing import Any

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
from vla_jax.sim.metaworld import MetaWorldEnv

ARMS = 32
"""Simulations in one batch; each takes about 30 MB."""


def evaluate_metaworld(
    policy: EvaluablePolicy,
    tasks: Sequence[str],
    config: EvaluateConfig,
    solver: SolverConfig,
    *,
    image_size: int = 64,
    progress: Progress = silent,
) -> Evaluation:
    """Success per task and group; with several tasks also success under another one's instruction."""
    if not tasks:
        raise ValueError("name at least one MetaWorld task, e.g. metaworld:button-press-v3")
    runner = Runner(policy, config, solver, progress)
    report: dict[str, Any] = {}
    own, wrong = [], []
    for number, task in enumerate(tasks):
        for piece, seeds in enumerate(pieces_of(config.seeds(), ARMS)):
            env = MetaWorldEnv([task] * len(seeds), image_size)
            try:
                if not own:
                    observation = env.reset(seeds)
                    few = min(config.diversity_scenes, len(seeds))
                    report["chunk_diversity"] = runner.diversity(take(observation, range(few)), seeds[:few])
                    report |= runner.latency_ms(take(observation, [0]), seeds[0])
                record = max(1, config.record // len(tasks)) if piece == 0 else 0
                own.append(runner.run(task, env, seeds, record=record))
            finally:
                env.close()
            if len(tasks) > 1:
                other = tasks[(number + 1) % len(tasks)]
                env = MetaWorldEnv([task] * len(seeds), image_size, instruction=other)
                try:
                    wrong += runner.run(f"{task} told “{other}”", env, seeds).records
                finally:
                    env.close()
    joined = join(own)
    details: dict[str, Any] = motion_of(joined.records) | {"per_group": metrics.per_group(joined.records)}
    if wrong:
        details["wrong_instruction_success"] = metrics.mean_of(wrong, "success")
        details["wrong_instruction_per_task"] = metrics.per_task(wrong)
    report = metrics.success_summary(joined.records) | report
    report["per_task"] = metrics.per_task(joined.records)
    return Evaluation(report=finish(report, details, runner.config, solver), rollout=joined)
