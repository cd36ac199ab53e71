"""Closed-loop evaluation of a policy: what all environments share.

What is asked and counted stands in `evaluate_tabletop` and `evaluate_metaworld`. The report is plain JSON; keys
that do not apply are absent; `details` holds what the pictures and tables add.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from vla_jax.finite import finite
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.executors import ChunkExecutor, ChunkPolicy, ExecutorConfig, ExecutorKind, make_executor
from vla_jax.sim import metrics
from vla_jax.sim.env import VectorEnv
from vla_jax.sim.rollout import Rollout, rollout
from vla_jax.sim.sources import EVALUATION_SEEDS_FROM
from vla_jax.types import Observation

SEEDS_APART = 1_000_000
"""Distance between the first episodes of two evaluation seeds, so that they share none."""

Use = Literal["episodes", "plans", "diversity", "latency"]
"""What draws noise. All runs of an episode (its own instruction, another, a forced plan) share one, so that they can be
compared in pairs."""

Progress = Callable[[str, int, int], None]
"""Called with what is running, how many episodes it has, and how many more have ended."""


def silent(name: str, total: int, ended: int) -> None:
    """Progress that is not shown."""


class EvaluablePolicy(ChunkPolicy, Protocol):
    """What evaluation asks of a policy beyond acting."""

    @property
    def writes_plans(self) -> bool:
        """Whether it was trained to predict the text target."""
        ...

    @property
    def sees_plans(self) -> bool:
        """Whether its actions were trained with a visible text target."""
        ...

    @property
    def action_scale(self) -> Float[np.ndarray, " a"]:
        """Standard deviation of each action dimension in the training data."""
        ...

    def act(
        self,
        observation: Observation,
        key: PRNGKeyArray,
        *,
        solver: SolverConfig,
        plan: Sequence[str] | None = None,
        plan_visible: bool = False,
        samples: int = 1,
    ) -> Float[np.ndarray, "b *samples k a"]:
        """One chunk of actions per robot, or `samples` of them; `guidance` is given too where it is asked for."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class EvaluateConfig:
    """What to run."""

    episodes: int = 512
    """Held-out episodes (of each task)."""
    seed: int = 0
    """Chooses the scenes and the policy's noise."""
    execute: int | None = None
    """Actions run of each chunk before the next prediction; None: the policy's own number."""
    plan_visible: bool = False
    """Let the actions see the plan that is decoded at each episode's start."""
    temperature: float = 0.0
    """Of decoded plans; 0 is greedy."""
    executor: ExecutorKind = "receding"
    """How chunks become motion, see `serve.executors.ExecutorConfig.kind`."""
    delay: int = 0
    """Control steps that a prediction takes."""
    overlap: int | None = None
    """rtc, rtc_jacobian_free: steps of the old chunk that the new one is pulled to; None: all."""
    guidance: float | None = None
    """The instruction's weight; None: the plain policy."""
    samples: int = 32
    """Chunks sampled per scene to measure diversity."""
    diversity_scenes: int = 16
    """Scenes in which diversity is measured."""
    latency_calls: int = 60
    """Timed calls at batch 1; fewer where they take longer than 20 s altogether."""
    record: int = 64
    """Episodes whose frames are kept for pictures."""

    def __post_init__(self):
        for name, least in {"episodes": 1, "samples": 2, "diversity_scenes": 1, "latency_calls": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.episodes > SEEDS_APART:
            raise ValueError(f"episodes={self.episodes}: at most {SEEDS_APART}")
        seeds = (2**32 - EVALUATION_SEEDS_FROM) // SEEDS_APART
        if not 0 <= self.seed < seeds:
            raise ValueError(f"seed={self.seed}: must lie in [0, {seeds})")

    def seeds(self) -> list[int]:
        """The episodes' seeds, none of which a demonstration has."""
        first = EVALUATION_SEEDS_FROM + self.seed * SEEDS_APART
        return list(range(first, first + self.episodes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The report, and the own-instruction episodes behind it."""

    report: dict[str, Any]
    rollout: Rollout


class Runner:
    """A policy with its settings: runs episodes in pieces, each use with noise of its own."""

    def __init__(
        self, policy: EvaluablePolicy, config: EvaluateConfig, solver: SolverConfig, progress: Progress
    ):
        if config.plan_visible and not (policy.writes_plans and policy.sees_plans):
            raise ValueError(
                "plan_visible: this policy was not trained to act on plans; train with objective.text and "
                "objective.plan_visible above 0, or leave --plan-visible out"
            )
        if config.execute is None:
            config = dataclasses.replace(config, execute=policy.execute)
        self.policy, self.config, self.solver, self.progress = policy, config, solver, progress
        self._executor(self.key("episodes"))  # refuses what cannot be executed before anything is run

    def key(self, use: Use) -> jax.Array:
        """The key of one use: other uses, or settings that leave one out, do not change it."""
        return jax.random.fold_in(jax.random.key(self.config.seed), get_args(Use).index(use))

    def episode_keys(self, use: Use, seeds: Sequence[int]) -> jax.Array:
        """One key per episode, by its seed: its noise is the same whatever runs beside it and under any setting."""
        return jax.vmap(jax.random.fold_in, (None, 0))(self.key(use), np.asarray(seeds, np.uint32))

    def run(
        self,
        name: str,
        env: VectorEnv,
        seeds: Sequence[int],
        *,
        plan: Sequence[str] | None = None,
        record: int = 0,
    ) -> Rollout:
        """One rollout of the configured executor."""
        return rollout(
            env,
            self._executor(self.episode_keys("episodes", seeds), env),
            seeds,
            plan=plan,
            record=record,
            progress=lambda ended: self.progress(name, len(seeds), ended),
        )

    def _executor(self, key: jax.Array, env: VectorEnv | None = None) -> ChunkExecutor:
        config = ExecutorConfig(
            kind=self.config.executor,
            execute=self.config.execute,
            delay=self.config.delay,
            overlap=self.config.overlap,
            plan_visible=self.config.plan_visible,
            temperature=self.config.temperature,
            guidance=self.config.guidance,
        )
        keeps = None if env is None else env.spec.kept.tolist()
        return make_executor(self.policy, config, solver=self.solver, key=key, keeps=keeps)

    def plan(self, observation: Observation, seeds: Sequence[int]) -> list[str]:
        """One decoded text per robot, whose episodes have these seeds."""
        return self.policy.plan(observation, self.episode_keys("plans", seeds), self.config.temperature)

    @property
    def _guided(self) -> dict[str, Any]:
        return {} if self.config.guidance is None else {"guidance": self.config.guidance}

    def diversity(self, observation: Observation, seeds: Sequence[int]) -> float:
        """Mean pairwise distance of chunks sampled for the first observation of some episodes."""
        chunks = self.policy.act(
            observation,
            self.episode_keys("diversity", seeds),
            solver=self.solver,
            plan=self.plan(observation, seeds) if self.config.plan_visible else None,
            plan_visible=self.config.plan_visible,
            samples=self.config.samples,
            **self._guided,
        )
        return metrics.chunk_diversity(np.asarray(chunks), self.policy.action_scale)

    def latency_ms(self, observation: Observation, seed: int) -> dict[str, float]:
        """Median and 95th percentile of one `act` for one robot: images in, actions on the host out.

        Compilation and warm-up come first. With `plan_visible` the plan is given, as it is held in an episode.
        """
        plan = self.plan(observation, [seed]) if self.config.plan_visible else None
        keys = list(jax.random.split(self.key("latency"), self.config.latency_calls + 3))
        taken = []
        for key in keys:
            start = time.perf_counter()
            jax.block_until_ready(
                self.policy.act(
                    observation,
                    key,
                    solver=self.solver,
                    plan=plan,
                    plan_visible=self.config.plan_visible,
                    **self._guided,
                )
            )
            taken.append(1e3 * (time.perf_counter() - start))
            if sum(taken[3:]) > 20e3 and len(taken) >= 3 + 5:
                break
        median, late = np.percentile(taken[3:], [50, 95])
        return {"latency_ms_p50": float(median), "latency_ms_p95": float(late)}


def pieces_of(seeds: Sequence[int], size: int) -> list[list[int]]:
    """The seeds in as few pieces of at most `size` as possible, nearly equal ones."""
    return [piece.tolist() for piece in np.array_split(np.asarray(seeds), -(-len(seeds) // size))]


def join(pieces: Sequence[Rollout]) -> Rollout:
    """Several rollouts as one."""
    return Rollout(
        records=[record for piece in pieces for record in piece.records],
        recordings=[recording for piece in pieces for recording in piece.recordings],
    )


def motion_of(records: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Means over episodes of `metrics.Smoothness`."""
    return {name: metrics.mean_of(records, name) for name in metrics.Smoothness._fields}


def finish(
    report: dict[str, Any], details: dict[str, Any], config: EvaluateConfig, solver: SolverConfig
) -> dict[str, Any]:
    """Drops what does not apply and adds how it was measured."""
    kept = {key: value for key, value in report.items() if value is not None}
    return kept | {
        "seed": config.seed,
        "solver": dataclasses.asdict(solver),
        "config": dataclasses.asdict(config),
        "details": {key: value for key, value in details.items() if value is not None},
    }
