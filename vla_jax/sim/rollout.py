"""Running an executor in a batch of environments until every episode has ended."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, UInt8

from vla_jax.data.observations import seen
from vla_jax.sim.env import VectorEnv
from vla_jax.sim.metrics import smoothness
from vla_jax.types import Observation


class Executor(Protocol):
    """What a rollout asks of an executor (see `vla_jax.serve.executors`)."""

    @property
    def held_plan(self) -> Sequence[str] | None:
        """The plans that the episodes began with, if any."""
        ...

    @property
    def switches(self) -> Sequence[int]:
        """Steps at which a new chunk took over."""
        ...

    def reset(self, observation: Observation, plan: Sequence[str] | None = None) -> None:
        """Begins episodes, with plans where some are forced."""
        ...

    def __call__(
        self, observation: Observation, active: Bool[np.ndarray, " b"] | None = None
    ) -> Float[np.ndarray, "b execute a"]:
        """The actions to run now."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """What one camera saw of one episode at its start and after each executed piece of a chunk."""

    frames: list[UInt8[np.ndarray, "h w 3"]]
    seconds: list[float]
    instruction: str
    plan: str | None
    record: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """The episodes' records (the environment's, and `metrics.Smoothness`), and recordings of the first of them."""

    records: list[dict[str, Any]]
    recordings: list[Recording]


def rollout(
    env: VectorEnv,
    executor: Executor,
    seeds: Sequence[int],
    *,
    plan: Sequence[str] | None = None,
    record: int = 0,
    camera: str | None = None,
    progress: Callable[[int], None] = lambda ended: None,
) -> Rollout:
    """Runs one episode per seed to its end.

    **Arguments:**

    - `plan`: one forced plan per episode; None leaves the plan to the executor.
    - `record`: how many episodes to record, seen by `camera` (default: the environment's first).
    - `progress`: called after each piece with how many more episodes have ended.
    """
    observation = env.reset(seeds)
    executor.reset(observation, plan)
    camera = camera or next(iter(env.spec.cameras))
    recorded = range(min(record, len(seeds)))
    frames = [[seen(observation, camera)[i].copy()] for i in recorded]
    seconds = [[0.0] for _ in recorded]
    instructions, plans = observation.instruction, executor.held_plan or (None,) * len(seeds)
    done, steps, executed = np.asarray(env.done), 0, []
    while not done.all():
        actions = executor(observation, active=~done)
        observation = env.advance(actions)
        executed.append(actions)
        steps += actions.shape[1]
        for i in recorded:
            if not done[i]:
                frames[i].append(seen(observation, camera)[i].copy())
                seconds[i].append(steps / env.spec.control_hz)
        ended = np.asarray(env.done)
        progress(int(ended.sum() - done.sum()))
        done = ended
    records = env.results()
    if executed:
        rates = np.concatenate(executed, axis=1)[..., ~env.spec.kept]
        ends = [record["steps"] for record in records]
        motion = smoothness(rates, ends, executor.switches, env.spec.control_hz)
        records = [record | one._asdict() for record, one in zip(records, motion)]
    recordings = [
        Recording(
            frames=frames[i],
            seconds=[*seconds[i][:-1], records[i]["time_s"]],
            instruction=instructions[i],
            plan=plans[i],
            record=records[i],
        )
        for i in recorded
    ]
    return Rollout(records=records, recordings=recordings)
