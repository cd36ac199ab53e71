"""What all executors share, and the plainest: look, predict a chunk, run the first of it, look again."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from vla_jax.data.observations import check_observation, check_texts, take
from vla_jax.finite import finite
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.noise import Keys, check_keys, draws, noise_keys, robot_keys, typed
from vla_jax.types import Observation

ExecutorKind = Literal["receding", "async", "ensemble", "rtc", "rtc_jacobian_free", "rtc_prefix"]
Continuation = Literal["vjp", "jacobian_free", "prefix"]
"""How a new chunk is made to continue the one that runs; see `flow.guidance`: the first two are `soft_inpaint`,
prefix is `clean_prefix`, for policies that were trained with `objective.rtc_prefix`."""

CONTINUATIONS: dict[str, Continuation] = {
    "rtc": "vjp",
    "rtc_jacobian_free": "jacobian_free",
    "rtc_prefix": "prefix",
}
"""Kinds whose new chunk continues the one that runs, and how."""

PULLED = ("rtc", "rtc_jacobian_free")
"""Those that pull more of the new chunk to the old one than what runs anyway."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """The chunk that robots run while the next one is computed, from the new chunk's first step on."""

    actions: Float[np.ndarray, "b k a"]
    """In the robot's units; from step `end` on anything finite."""
    delay: int
    """Steps that will have run before the new chunk is there: these are to be kept."""
    end: int
    """Steps that are planned at all."""
    how: Continuation = "vjp"
    """How the new chunk continues it."""
    bound: float = 5.0
    """β, the largest strength of soft inpainting."""


class ChunkPolicy(Protocol):
    """What an executor asks of a policy; `vla_jax.serve.policy.Policy` is one, a scripted expert another.

    `key` is one key per robot, [b]: what is drawn for a robot is not to depend on who is asked beside it.
    `act` gets `guidance` and `running` only where the executor's configuration asks for them.
    """

    @property
    def horizon(self) -> int:
        """k, the number of actions in a chunk."""
        ...

    @property
    def execute(self) -> int:
        """How many of them to run where the executor's configuration does not say; not asked for where it does."""
        ...

    def plan(self, observation: Observation, key: Keys, temperature: float) -> list[str]:
        """One text per robot; greedily at temperature 0."""
        ...

    def act(
        self,
        observation: Observation,
        key: Keys,
        *,
        solver: SolverConfig,
        plan: Sequence[str] | None = None,
        plan_visible: bool = False,
    ) -> Float[np.ndarray, "b k a"]:
        """One chunk of actions per robot, in the robot's units."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class ExecutorConfig:
    """How a policy's chunks are executed."""

    kind: ExecutorKind = "receding"
    """receding: predict, run, look again; the robot stands still while a prediction takes its time. async: it goes on
    with the old chunk meanwhile, then switches. ensemble: it runs the average of all chunks that cover a step. rtc,
    rtc_jacobian_free, rtc_prefix: async, and the new chunk is made to continue the old one (real-time chunking)."""
    execute: int | None = None
    """Steps from one prediction to the next; None: the policy's own number."""
    delay: int = 0
    """Steps that a prediction takes."""
    plan_visible: bool = False
    """Decode a plan at the episode's start, hold it, and show it to the actions."""
    temperature: float = 0.0
    """Of that plan; 0 takes the likeliest word each time, 1 samples."""
    guidance: float | None = None
    """Weight of the instruction (classifier-free guidance); None and 1: none."""
    decay: float = 0.01
    """ensemble: the weight of the i-th oldest chunk is exp(-decay · i)."""
    bound: float = 5.0
    """rtc, rtc_jacobian_free: largest strength of the pull towards the old chunk."""
    overlap: int | None = None
    """rtc, rtc_jacobian_free: how many steps of the old chunk the new one is pulled to; None: all that it plans. Less
    commits less to what was seen earlier."""

    def __post_init__(self):
        if self.kind not in get_args(ExecutorKind):
            raise ValueError(
                f"executor {self.kind!r} is unknown; use one of {', '.join(get_args(ExecutorKind))}"
            )
        if self.execute is not None and self.execute < 1:
            raise ValueError(f"execute={self.execute}: run at least 1 action of each chunk")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; 0 is greedy")
        if self.delay < 0:
            raise ValueError(f"delay={self.delay}: must not be negative")
        if self.overlap is not None and self.kind not in PULLED:
            raise ValueError(
                f"overlap={self.overlap} does nothing with executor {self.kind}; use {' or '.join(PULLED)}, or leave "
                "--overlap out"
            )
        if self.overlap is not None and self.overlap < self.delay:
            raise ValueError(
                f"overlap={self.overlap} is less than delay={self.delay}: the steps that run meanwhile are to be kept; "
                f"use --overlap {self.delay} or more"
            )
        if self.kind != "receding" and self.execute is not None and self.delay > self.execute:
            raise ValueError(
                f"delay={self.delay} is more than execute={self.execute}: a prediction would begin before the last "
                f"one is there; use --execute {self.delay} or more"
            )

    @property
    def executed(self) -> int:
        """`execute` where it is known. Raises ValueError where it was left to the policy."""
        if self.execute is None:
            raise ValueError("execute is not set; ExecutorConfig.of(policy) takes the policy's own number")
        return self.execute

    def of(self, policy: ChunkPolicy) -> "ExecutorConfig":
        """The configuration with the policy's own `execute` where none is given; ValueError if its chunks are short."""
        config = dataclasses.replace(self, execute=policy.execute) if self.execute is None else self
        config.check(policy.horizon)
        return config

    def check(self, horizon: int) -> None:
        """ValueError unless chunks of that length are long enough."""
        execute = self.executed
        if execute > horizon:
            raise ValueError(
                f"execute={execute} is more than the {horizon} actions of a predicted chunk; "
                f"use --execute {horizon} or less"
            )
        if self.kind != "receding" and execute + self.delay > horizon:
            raise ValueError(
                f"execute={execute} and delay={self.delay} are together more than the {horizon} actions of a "
                f"predicted chunk, which would end before the next one is there; use --execute {horizon - self.delay} "
                "or less"
            )


class ChunkExecutor:
    """The plan that episodes began with, noise of its own for each prediction, and the count of steps.

    `key`: one for each robot's episode, [b], or one of which each robot has a part by its row. An episode's noise is a
    function of its key and the step alone, so that two settings can be compared episode by episode.

    What is given and returned is owned by whoever has it: observations may be filled anew and actions written to after
    the call. An observation that no robot can have is a ValueError, actions that are not finite are a
    FloatingPointError; after both the executor is as it was before the call.
    `keeps` says which action dimensions keep their last value while a robot waits (a gripper, positions); the others
    (rates) are then zero. Default: none keeps it.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        config: ExecutorConfig,
        *,
        solver: SolverConfig,
        key: Keys,
        keeps: Bool[np.ndarray, " a"] | Sequence[bool] | None = None,
    ):
        self._policy, self._config, self._solver, self._key = policy, config.of(policy), solver, typed(key)
        self._keeps = None if keeps is None else np.asarray(keeps, bool)
        self._steps, self._robots = 0, 0
        self.held_plan: tuple[str, ...] | None = None
        self.switches: list[int] = []
        """Steps of the episode at which a new chunk took over."""

    def reset(self, observation: Observation, plan: Sequence[str] | None = None) -> None:
        """Begins an episode; a given `plan` (one text per robot) is held in place of a decoded one."""
        self._robots = 0  # no episode, should what follows fail
        observation = check_observation(observation)
        robots = len(observation.instruction)
        drawn = draws(check_keys(self._key, robots), robots)
        if plan is None and self._config.plan_visible:
            plan = self._policy.plan(observation, robot_keys(drawn.plan, robots), self._config.temperature)
        self.held_plan = None if plan is None else check_texts("plan", plan, robots)
        self._steps, self.switches, self._robots, self._keys = 0, [], robots, drawn.actions

    def __call__(
        self, observation: Observation, active: Bool[np.ndarray, " b"] | None = None
    ) -> Float[np.ndarray, "b steps a"]:
        """The actions to run now, in the robot's units; anything for robots that are not `active`.

        Nothing is computed for inactive robots (episodes that have ended).
        """
        raise NotImplementedError  # each kind of executor has its own; this class is what they share

    def _look(self, observation: Observation) -> Observation:
        """What the robots see, checked. Raises ValueError."""
        observation = check_observation(observation)
        if not self._robots:
            raise ValueError("no episode has begun: call reset(observation) first")
        if len(observation.instruction) != self._robots:
            raise ValueError(
                f"instruction has {len(observation.instruction)} texts; the episode began with {self._robots} robots: "
                "give the same ones, and say in `active` which still move"
            )
        return observation

    def _predict(
        self,
        observation: Observation,
        active: Bool[np.ndarray, " b"] | None,
        running: Running | None = None,
        step: int | None = None,
    ) -> Float[np.ndarray, "b k a"]:
        """A chunk per robot, zeros for those that are not active, with the noise of a step (default: the present one).

        Raises FloatingPointError where it is not finite: nothing of it reaches a robot.
        """
        robots, step = len(observation.instruction), self._steps if step is None else step
        rows = np.arange(robots) if active is None else np.flatnonzero(active)
        options: dict[str, Any] = {}
        if self._config.guidance is not None:
            options["guidance"] = self._config.guidance
        if running is not None:
            options["running"] = dataclasses.replace(running, actions=running.actions[rows])
        chunk = self._policy.act(
            take(observation, rows),
            noise_keys(self._keys, step)[rows],
            solver=self._solver,
            plan=None if self.held_plan is None else [self.held_plan[row] for row in rows],
            plan_visible=self.held_plan is not None,
            **options,
        )
        chunk = np.asarray(chunk)
        check_finite(chunk, rows)
        chunks = np.zeros((robots, *chunk.shape[1:]), chunk.dtype)
        chunks[rows] = chunk
        return chunks

    def _wait(self, last: Float[np.ndarray, "b a"], steps: int) -> Float[np.ndarray, "b steps a"]:
        """What robots do while they have nothing to do, after the action `last`."""
        still = np.zeros_like(last) if self._keeps is None else np.where(self._keeps, last, 0)
        return np.repeat(still[:, None], steps, axis=1)

    def _count(self, actions: Float[np.ndarray, "b steps a"], switch: int) -> Float[np.ndarray, "b steps a"]:
        """Hands actions on; a new chunk begins at their step `switch`."""
        if self._steps:
            self.switches.append(self._steps + switch)
        self._steps += actions.shape[1]
        return actions.copy()


class RecedingHorizon(ChunkExecutor):
    """Runs the first `execute` actions of each chunk, then stands still for `delay` steps while it predicts anew."""

    def reset(self, observation: Observation, plan: Sequence[str] | None = None) -> None:
        """Begins an episode, in which there is no last action yet."""
        super().reset(observation, plan)
        self._last: Float[np.ndarray, "b a"] | None = None

    def __call__(
        self, observation: Observation, active: Bool[np.ndarray, " b"] | None = None
    ) -> Float[np.ndarray, "b steps a"]:
        """The wait (not before the first chunk), and the first actions of a new chunk."""
        actions = self._predict(self._look(observation), active)[:, : self._config.executed]
        waits = 0
        if self._last is not None and self._config.delay:
            waits = self._config.delay
            actions = np.concatenate([self._wait(self._last, waits), actions], axis=1)
        self._last = actions[:, -1]
        return self._count(actions, waits)


def check_finite(chunks: Float[np.ndarray, "b ..."], robots: Sequence[int] | Int[np.ndarray, " b"]) -> None:
    """Raises FloatingPointError, which names the robots, where actions are NaN or infinite."""
    finite = np.isfinite(chunks).reshape(len(chunks), -1).all(axis=1)
    if not finite.all():
        which = ", ".join(str(int(robots[row])) for row in np.flatnonzero(~finite)[:8])
        raise FloatingPointError(
            f"the policy's actions for robot {which} are not finite, so none is given to a robot: check the checkpoint "
            "(a diverged run, a damaged file) and the number format that it is run in"
        )
