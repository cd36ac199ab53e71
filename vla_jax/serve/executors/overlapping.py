"""Asynchronous execution: the robot runs the old chunk while the new one is computed, then switches to it.

At a look at step τ the new chunk begins, too, but is there at τ + delay only: until then the old chunk runs, and the
first `delay` actions of the new one are never run. Naive: two chunks are two samples, so that what was begun in one way
may go on in another. Real-time chunking (Black et al. 2506.07339): the policy is told what runs (`Running`) and
continues it.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from vla_jax.serve.executors.base import CONTINUATIONS, ChunkExecutor, ExecutorConfig, Running
from vla_jax.types import Observation


class Overlapping(ChunkExecutor):
    """Kinds async, rtc, rtc_jacobian_free and rtc_prefix, with a delay that is always the same."""

    def reset(self, observation: Observation, plan: Sequence[str] | None = None) -> None:
        """Begins an episode; its first chunk is waited for."""
        super().reset(observation, plan)
        self._rest: Float[np.ndarray, "b k a"] | None = None

    def __call__(
        self, observation: Observation, active: Bool[np.ndarray, " b"] | None = None
    ) -> Float[np.ndarray, "b execute a"]:
        """The old chunk's next `delay` actions, then those of the new chunk."""
        observation, config = self._look(observation), self._config
        rest = self._rest
        delay = 0 if rest is None else config.delay
        chunk = self._predict(observation, active, self._running(rest, delay))
        actions = chunk[:, : config.executed]
        if rest is not None and delay:
            actions = np.concatenate([rest[:, :delay], chunk[:, delay : config.executed]], axis=1)
        self._rest = shifted(chunk, config.executed)
        return self._count(actions, delay)

    def _running(self, rest: Float[np.ndarray, "b k a"] | None, delay: int) -> Running | None:
        return running(self._config, rest, delay, self._policy.horizon - self._config.executed)


def running(
    config: ExecutorConfig, rest: Float[np.ndarray, "b k a"] | None, delay: int, end: int
) -> Running | None:
    """What the policy is told of the chunk that runs; None where it is told nothing."""
    if rest is None or config.kind not in CONTINUATIONS:
        return None
    how = CONTINUATIONS[config.kind]
    if config.overlap is not None:
        end = min(end, max(config.overlap, delay))
    return Running(actions=rest, delay=min(delay, end), end=end, how=how, bound=config.bound)


def shifted(chunk: Float[np.ndarray, "b k a"], steps: int) -> Float[np.ndarray, "b k a"]:
    """The chunk from its step `steps` on; zeros where it has ended."""
    return np.concatenate([chunk[:, steps:], np.zeros_like(chunk[:, :steps])], axis=1)
