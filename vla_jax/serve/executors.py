"""From chunks to motion: an executor holds what changes during an episode, so that a policy need not.

Receding horizon: predict a chunk of k actions, run the first K of them, look again, predict the next chunk.
All executors are vectorised: one executor drives a batch of b environments in lockstep.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vla_jax.flow.config import SolverConfig
from vla_jax.types import Observation


class ChunkPolicy(Protocol):
    """What an executor asks of a policy; `vla_jax.serve.policy.Policy` is one, a scripted expert another."""

    @property
    def horizon(self) -> int:
        """k, the number of actions in a chunk."""

    def plan(self, observation: Observation, key: PRNGKeyArray) -> list[str]:
        """One text per robot."""

    def act(
        self,
        observation: Observation,
        key: PRNGKeyArray,
        *,
        solver: SolverConfig,
        plan: Sequence[str] | None = None,
        see_plan: bool = False,
    ) -> Float[np.ndarray, "b k a"]:
        """One chunk of actions per robot, in the robot's units."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """How a policy's chunks are executed."""

    execute: int = 8
    """Actions run of each chunk before the next prediction."""
    see_plan: bool = False
    """Decode a plan at the episode's start, hold it, and show it to the actions."""

    def __post_init__(self):
        if self.execute < 1:
            raise ValueError(f"execute={self.execute}: run at least 1 action of each chunk")


class RecedingHorizon:
    """Runs the first `config.execute` actions of each chunk, then predicts anew.

    The only state is the number of predictions so far (each has its own noise, derived from `key`) and the
    plan that the episode began with.
    """

    def __init__(
        self, policy: ChunkPolicy, config: ExecutorConfig, *, solver: SolverConfig, key: PRNGKeyArray
    ):
        if config.execute > policy.horizon:
            raise ValueError(
                f"execute={config.execute} is more than the {policy.horizon} actions of a predicted chunk; "
                f"use --execute {policy.horizon} or less"
            )
        self._policy, self._config, self._solver, self._key = policy, config, solver, key
        self._calls = 0
        self.held_plan: tuple[str, ...] | None = None

    def reset(self, observation: Observation, plan: Sequence[str] | None = None) -> None:
        """Begins an episode; a given `plan` (one text per robot) is held in place of a decoded one."""
        self._calls = 0
        if plan is None and self._config.see_plan:
            plan = self._policy.plan(observation, self._next_key())
        if plan is not None and len(plan) != len(observation.instruction):
            raise ValueError(
                f"{len(plan)} plans for {len(observation.instruction)} robots: give one for each"
            )
        self.held_plan = None if plan is None else tuple(plan)

    def __call__(
        self, observation: Observation, active: Bool[np.ndarray, " b"] | None = None
    ) -> Float[np.ndarray, "b execute a"]:
        """The actions to run now, in the robot's units; zeros for robots that are not `active`.

        Nothing is computed for inactive robots (episodes that have ended).
        """
        robots = len(observation.instruction)
        rows = np.arange(robots) if active is None else np.flatnonzero(active)
        chunk = self._policy.act(
            take(observation, rows),
            self._next_key(),
            solver=self._solver,
            plan=None if self.held_plan is None else [self.held_plan[row] for row in rows],
            see_plan=self.held_plan is not None,
        )
        chunk = np.asarray(chunk)[:, : self._config.execute]
        actions = np.zeros((robots, *chunk.shape[1:]), chunk.dtype)
        actions[rows] = chunk
        return actions

    def _next_key(self) -> Array:
        key = jax.random.fold_in(self._key, self._calls)
        self._calls += 1
        return key


def take(observation: Observation, rows: Sequence[int] | Int[np.ndarray, " r"]) -> Observation:
    """The observations of some robots."""
    return Observation(
        images={name: image[np.asarray(rows)] for name, image in observation.images.items()},
        state=observation.state[np.asarray(rows)],
        instruction=tuple(observation.instruction[row] for row in rows),
    )
