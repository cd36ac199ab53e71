"""From noise to chunks with the compiled network: a static scan over the solver's steps.

Explicit Runge-Kutta on a uniform grid of a flow has a loop of its own: the conditioning of each stage is an input of
the scan, and the step size is folded into the last projection, so that Euler's step is ``x + network(x)``. Anything
else (diffusion, Karras' grid, adaptive methods) is sampled by the process itself, over a field that looks its
conditioning up by time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vla_jax.flow.config import FIXED, SolverConfig
from vla_jax.flow.guidance import mix
from vla_jax.flow.processes import Flow, Process
from vla_jax.flow.solvers import TABLEAUS, Field, time_grid
from vla_jax.models.config import VLAConfig
from vla_jax.serve.compiled.conditioning import Condition, condition, evaluation_times, table
from vla_jax.serve.compiled.network import Network, Prefix
from vla_jax.serve.sampling import Overlap, continuing
from vla_jax.types import PyTree


def stage_times(solver: SolverConfig) -> Float[np.ndarray, "n stages"]:
    """When each stage of each step of a uniform grid looks at the field.

    Rounded as `flow.solvers.integrate` rounds them: the time embedding turns by up to 1600 rad, where the last bit of
    a float32 time is seen.
    """
    times = time_grid("uniform", solver.num_steps).astype(np.float32)
    return times[:-1, None] + np.asarray(TABLEAUS[solver.method].c, np.float32) * np.diff(times)[:, None]


def own_loop(process: Process, solver: SolverConfig) -> bool:
    """Whether the loop of this module solves it."""
    return isinstance(process, Flow) and solver.method in FIXED and solver.grid == "uniform"


def schedule(
    weights: PyTree, network: Network, process: Process, solver: SolverConfig
) -> tuple[Any, Condition] | None:
    """The conditioning at the solver's times, and those times; None where it is computed at every evaluation.

    `weights` are the expert's. For the loop of this module [n stages …], otherwise one entry per different time.
    """
    if not network.rewrites.time:
        return None
    model = network.model
    if own_loop(process, solver):
        times = stage_times(solver)
        flat = _table(weights, model, times.reshape(-1))
        return times, jax.tree.map(lambda leaf: leaf.reshape(*times.shape, *leaf.shape[1:]), flat)
    shape = (1, model.expert.horizon, model.expert.action_dim)
    times = evaluation_times(process, solver, shape)
    return None if times is None else (times, _table(weights, model, times))


def _table(weights: PyTree, model: VLAConfig, times: Float[np.ndarray, " u"]) -> Condition:
    return jax.jit(lambda weights: table(weights, model, times))(weights)


class Run(NamedTuple):
    """All that a solver's evaluations have in common. `weights` are the expert's, `state` is as in `denoise`."""

    network: Network
    weights: PyTree
    prefix: Prefix
    state: Float[Array, "b q"] | None
    conditions: tuple[Any, Condition] | None
    guidance: Float[Array, " r"] | None
    """Weight of the instruction for each row; the second half of the prefix is then that of null prompts."""

    def predict(self, x: Float[Array, "r k a"], at: Condition, out: PyTree) -> Float[Array, "r k a"]:
        """The prediction; guided, that of both prompts as one doubled batch (Ho & Salimans 2207.12598, eq. 6)."""
        denoise = functools.partial(self.network.denoise, self.weights, self.prefix)
        if self.guidance is None:
            return denoise(x, at, out, self.state)
        at = jax.tree.map(lambda leaf: _doubled(leaf, x.shape[0]), at)
        prompted, null = jnp.split(denoise(jnp.concatenate([x, x]), at, out, self.state), 2)
        return mix(prompted, null, self.guidance[:, None, None])


def sample(
    run: Run, noise: Float[Array, "r k a"], keys: Array, process: Process, solver: SolverConfig
) -> Float[Array, "r k a"]:
    """Chunks. Flow starts from `noise`; diffusion draws all it needs from `keys` [b], regression nothing."""
    if own_loop(process, solver):
        return _runge_kutta(run, noise, solver)
    field = _field(run)
    if isinstance(process, Flow):
        return process.sample(field, keys, noise.shape, solver, noise=noise).x
    return process.sample(field, keys, noise.shape, solver).x


def sample_on(
    run: Run,
    noise: Float[Array, "r k a"],
    keys: Array,
    process: Flow,
    solver: SolverConfig,
    overlap: Overlap,
    real: Bool[Array, " a"],
) -> Float[Array, "r k a"]:
    """Chunks that continue those that run; `real`: the action dimensions that exist."""
    field, noise = continuing(_field(run), overlap, noise, real)
    return process.sample(field, keys, noise.shape, solver, noise=noise).x


def _field(run: Run) -> Field:
    """The network as a function of (x, t)."""

    def field(x: Float[Array, "r k a"], t: Float[Array, "r *k"]) -> Float[Array, "r k a"]:
        if run.conditions is None or t.ndim > 1:
            at = _now(run, t, x.shape[1])
        else:
            times, entries = run.conditions
            if np.ndim(times) == 2:  # those of the own loop, by step and stage
                times = jnp.reshape(times, -1)
                entries = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), entries)
            nearest = jnp.argmin(jnp.abs(jnp.asarray(times) - t[0]))
            at = jax.tree.map(lambda leaf: leaf[nearest], entries)
        return run.predict(x, at, run.weights["action_out"])

    return field


def _now(run: Run, t: Float[Array, "r *k"], horizon: int) -> Condition:
    """The conditioning computed here, for every row and token as the plain network does."""
    t = jnp.broadcast_to(t[:, None] if t.ndim == 1 else t, (t.shape[0], horizon))
    return condition(run.weights, run.network.model, t)


def _doubled(leaf: Float[Array, "*n #r #t d"], rows: int) -> Float[Array, "*n #r #t d"]:
    """A conditioning for twice the rows, unless it is broadcast over them."""
    if leaf.shape[-3] == 1:
        return leaf
    assert leaf.shape[-3] == rows
    return jnp.concatenate([leaf, leaf], axis=-3)


def _runge_kutta(run: Run, x: Float[Array, "r k a"], solver: SolverConfig) -> Float[Array, "r k a"]:
    tableau, h = TABLEAUS[solver.method], 1 / solver.num_steps
    out, factor = run.weights["action_out"], h
    if run.network.rewrites.projections:
        out, factor = jax.tree.map(lambda leaf: leaf * h, out), 1.0
    entries = stage_times(solver) if run.conditions is None else run.conditions[1]

    def step(x: Array, entry: Any) -> tuple[Array, None]:
        moves: list[Array] = []
        for number, row in enumerate(((), *tableau.a)):
            at = jax.tree.map(lambda leaf: leaf[number], entry)
            if run.conditions is None:
                at = _now(run, jnp.broadcast_to(at, x.shape[:1]), x.shape[1])
            moved = sum((w * move for w, move in zip(row, moves) if w), x)
            move = run.predict(moved, at, out)
            moves.append(move if factor == 1 else factor * move)
        return sum((w * move for w, move in zip(tableau.b, moves) if w), x), None

    return jax.lax.scan(step, x, entries, unroll=min(solver.unroll, solver.num_steps))[0]
