"""What the network knows of the time at a solver's times, computed once: a function of t alone (`Expert.condition`).

π0 adds a bias to the first layer of the action tokens' MLP; π0.5 scales, shifts and gates every norm.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vla_jax.flow.config import ADAPTIVE, FIXED, SolverConfig
from vla_jax.flow.processes import Flow, Process
from vla_jax.flow.solvers import stage_times
from vla_jax.models.vla import VLA
from vla_jax.types import PyTree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("times", "entries"), meta_fields=("by_stage",)
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionTable:
    """Entries for some times, along leading axes."""

    times: Float[Array, "u"] | Float[Array, "n stages"]
    entries: PyTree
    by_stage: bool
    """[n stages], for `flow.solvers.integrate`; otherwise [u], to be looked up."""

    def nearest(self, t: Float[Array, ""]) -> Any:
        """The entry of the time that is nearest to t."""
        leading = self.times.ndim
        i = jnp.argmin(jnp.abs(self.times.reshape(-1) - t))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[leading:])[i], self.entries)


def make_schedule(
    model: VLA, params: PyTree, process: Process, solver: SolverConfig
) -> ConditionTable | None:
    """The entries of a solver's times; None where these depend on what it finds on its way."""
    by_stage = isinstance(process, Flow) and solver.method in FIXED
    if by_stage:
        times = stage_times(solver.grid, solver.num_steps, solver.method)
    else:
        expert = model.config.expert
        found = evaluation_times(process, solver, (1, expert.horizon, expert.action_dim))
        if found is None:
            return None
        times = found
    entries = _entries(params, jnp.asarray(times, jnp.float32), model=model)
    return ConditionTable(times=jnp.asarray(times), entries=entries, by_stage=by_stage)


@functools.partial(jax.jit, static_argnames="model")
def _entries(params: PyTree, times: Float[Array, "*n"], *, model: VLA) -> PyTree:
    """`Expert.condition` at each of some times by itself, for one row."""

    def one(t: Float[Array, ""]) -> PyTree:
        return model.apply({"params": params}, t[None], method="condition")

    flat = jax.lax.map(one, times.reshape(-1))
    return jax.tree.map(lambda leaf: leaf.reshape(*times.shape, *leaf.shape[1:]), flat)


def evaluation_times(
    process: Process, solver: SolverConfig, shape: tuple[int, ...]
) -> Float[np.ndarray, " u"] | None:
    """The times, without repetitions, at which a solver asks the field; None where they depend on its answers.

    Found by running the very sampler on a field that answers zeros and writes down when it was asked.
    """
    if solver.method in ADAPTIVE:
        return None
    asked: list[float] = []

    def field(x, t):
        asked.append(float(np.asarray(t).reshape(-1)[0]))
        return jnp.zeros_like(x)

    with jax.disable_jit(), jax.default_device(jax.devices("cpu")[0]):
        process.sample(field, jax.random.key(0), (1, *shape[1:]), solver)
    return np.unique(np.asarray(asked, np.float32))
