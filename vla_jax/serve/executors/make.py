"""The executor that a configuration describes."""

from collections.abc import Sequence

from vla_jax.flow.config import SolverConfig
from vla_jax.serve.executors.base import ChunkExecutor, ChunkPolicy, ExecutorConfig, RecedingHorizon
from vla_jax.serve.executors.ensemble import TemporalEnsemble
from vla_jax.serve.executors.overlapping import Overlapping
from vla_jax.serve.noise import Keys


def make_executor(
    policy: ChunkPolicy,
    config: ExecutorConfig,
    *,
    solver: SolverConfig,
    key: Keys,
    keeps: Sequence[bool] | None = None,
) -> ChunkExecutor:
    """With a simulated delay; for a robot's own clock use `background.Background`."""
    kind = {"receding": RecedingHorizon, "ensemble": TemporalEnsemble}.get(config.kind, Overlapping)
    return kind(policy, config, solver=solver, key=key, keeps=keeps)
