"""Temporal ensembling (ACT, Zhao et al. 2304.13705, algorithm 2): each step runs the average of all its predictions."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from vla_jax.serve.executors.base import ChunkExecutor
from vla_jax.types import Observation


class TemporalEnsemble(ChunkExecutor):
    """Weights exp(-decay · i) for the i-th oldest of the chunks that cover a step; execute 1 is ACT's.

    With a delay a chunk counts from the step on at which it is there.
    """

    def reset(self, observation: Observation, plan: Sequence[str] | None = None) -> None:
        """Begins an episode; its first chunk is waited for."""
        super().reset(observation, plan)
        self._chunks: list[tuple[int, int, Float[np.ndarray, "b k a"]]] = []

    def __call__(
        self, observation: Observation, active: Bool[np.ndarray, " b"] | None = None
    ) -> Float[np.ndarray, "b execute a"]:
        """The averages for the next `execute` steps."""
        observation, now, config = self._look(observation), self._steps, self._config
        delay = config.delay if self._chunks else 0
        self._chunks.append((now, now + delay, self._predict(observation, active)))
        self._chunks = [entry for entry in self._chunks if entry[0] + self._policy.horizon > now]
        actions = [self._average(step) for step in range(now, now + config.executed)]
        return self._count(np.stack(actions, axis=1), delay)

    def _average(self, step: int) -> Float[np.ndarray, "b a"]:
        horizon = self._policy.horizon
        there = [
            chunk[:, step - start] for start, ready, chunk in self._chunks if ready <= step < start + horizon
        ]
        weights = np.exp(-self._config.decay * np.arange(len(there)))
        return np.tensordot(weights / weights.sum(), np.stack(there), axes=1).astype(there[0].dtype)
