"""From chunks to motion: an executor holds what changes during an episode, so that a policy need not.

    executor = make_executor(policy, ExecutorConfig(kind="rtc", execute=4, delay=2), solver=solver, key=key)
    executor.reset(observation)
    actions = executor(observation)          # [b steps a], to be run before the next look

Vectorised: one executor drives b robots in lockstep. A delay (control steps that a prediction takes) is simulated, the
same every time; `background.Background` is the same with a clock: it predicts in a thread while the robot moves. See
docs/execution.md.
"""

from vla_jax.serve.executors.base import (
    ChunkExecutor,
    ChunkPolicy,
    ExecutorConfig,
    ExecutorKind,
    RecedingHorizon,
    Running,
)
from vla_jax.serve.executors.ensemble import TemporalEnsemble
from vla_jax.serve.executors.make import make_executor
from vla_jax.serve.executors.overlapping import Overlapping

__all__ = [
    "ChunkExecutor",
    "ChunkPolicy",
    "ExecutorConfig",
    "ExecutorKind",
    "Overlapping",
    "RecedingHorizon",
    "Running",
    "TemporalEnsemble",
    "make_executor",
]
