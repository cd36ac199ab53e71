"""Asynchronous execution on a robot: a thread predicts while the robot moves, and the delay is measured.

    with Background(policy, ExecutorConfig(kind="rtc", execute=4), solver=solver, key=key) as executor:
        executor.reset(observe())
        while True:                                    # at the control rate
            robot.send(executor.step(observe()))

`step` never waits for the network. Time is counted in its calls, so it is to be called once per control period. A
prediction is asked for `execute` steps after the last one, with the newest observation; when it is there, as many of
its actions as steps have passed are left out. If it takes longer than the chunk lasts, the robot waits (`starved`
counts these steps), which no executor can avoid. `Overlapping` is the same with a delay that is always the same.
"""

import collections
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Float

from vla_jax.data.observations import owned
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.executors.base import CONTINUATIONS, ChunkExecutor, ChunkPolicy, ExecutorConfig
from vla_jax.serve.executors.overlapping import running, shifted
from vla_jax.serve.noise import Keys
from vla_jax.types import Observation

REMEMBERED = 10
"""Delays of which the longest is expected next (2506.07339, algorithm 1)."""


class Background(ChunkExecutor):
    """Kinds async, rtc, rtc_jacobian_free and rtc_prefix. `delay` is what is expected before one is measured.

    For rtc_prefix, which keeps no more steps than it was trained to, it is always what is expected at most.
    `pool` runs the predictions, one at a time (default: a thread).
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        config: ExecutorConfig,
        *,
        solver: SolverConfig,
        key: Keys,
        keeps: Bool[np.ndarray, " a"] | Sequence[bool] | None = None,
        pool: Executor | None = None,
    ):
        if config.kind != "async" and config.kind not in CONTINUATIONS:
            kinds = ", ".join(["async", *CONTINUATIONS])
            raise ValueError(f"executor {config.kind!r} does not run in the background; use one of {kinds}")
        super().__init__(policy, config, solver=solver, key=key, keeps=keeps)
        self._pool = pool or ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._pending: Future | None = None
        self._warm: set[int] = set()
        self.delays: collections.deque[int] = collections.deque(maxlen=REMEMBERED)
        """The last predictions' delays, in steps."""
        self.starved = 0
        """Steps of the episode at which there was nothing to run."""

    def reset(self, observation: Observation, plan: Sequence[str] | None = None) -> None:
        """Begins an episode and waits for its first chunk. A prediction for the last episode is thrown away."""
        if self._pending is not None:
            if not self._pending.cancel():
                self._pending.exception()  # waits for it
            self._pending = None
        super().reset(observation, plan)
        self.starved, self._asked = 0, 0
        robots, self._robots = (
            self._robots,
            0,
        )  # the last episode's chunk must not go on, should this one's not come
        self._chunk, self._origin = self._pool.submit(self._first, owned(observation)).result(), 0
        self._robots = robots
        self._last = np.zeros_like(self._chunk[:, 0])

    def step(self, observation: Observation) -> Float[np.ndarray, "b a"]:
        """The action of this control period.

        Raises what a prediction raised. Such a call does not count: the robot may stop, or call again in the same
        period for what the old chunk plans, while a new prediction is asked for.
        """
        observation = self._look(observation)
        if self._pending is not None and self._pending.done():
            pending, self._pending = self._pending, None
            self._chunk, self._origin = (
                pending.result(),
                self._asked,
            )  # where it raises, the old chunk goes on
            self.delays.append(self._steps - self._asked)
            self.switches.append(self._steps)
        if self._pending is None and self._steps - self._asked >= self._config.executed:
            self._ask(observation)
        offset = self._steps - self._origin
        if offset < self._policy.horizon:
            self._last = self._chunk[:, offset]
        else:
            self.starved += 1
            self._last = self._wait(self._last, 1)[:, 0]
        self._steps += 1
        return self._last.copy()

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _first(self, observation: Observation) -> Float[np.ndarray, "b k a"]:
        """The episode's first chunk, and for the first so many robots one that continues it and is thrown away.

        A continuation is a program of its own. Compiled at its first use, which takes longer than a chunk lasts, it
        would leave the robot without actions in the middle of the episode.
        """
        chunk, robots = self._predict(observation, None), len(observation.instruction)
        told = running(self._config, chunk, self._expected(), self._policy.horizon)
        if told is not None and robots not in self._warm:
            self._predict(observation, None, told)
            self._warm.add(robots)
        return chunk

    def _ask(self, observation: Observation) -> None:
        passed = self._steps - self._origin
        rest, end = shifted(self._chunk, passed), max(0, self._policy.horizon - passed)
        told = running(self._config, rest, self._expected(), end)
        self._asked = self._steps
        # The thread reads it while the robot fills its buffers anew.
        self._pending = self._pool.submit(self._predict, owned(observation), None, told, self._steps)

    def _expected(self) -> int:
        if not self.delays:
            return self._config.delay
        longest = max(self.delays)
        return min(longest, self._config.delay) if self._config.kind == "rtc_prefix" else longest
