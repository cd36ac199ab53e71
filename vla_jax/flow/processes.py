"""Processes: what is done to data in training, what a field predicts, how it is sampled.

Every process is a small frozen dataclass with the same three methods, so that a model, an objective and a
policy need not know which one they hold:

    corrupted = process.corrupt(key, a)                    # x_t, t, target, noise
    loss = process.loss(field(corrupted.x_t, corrupted.t), corrupted.target)      # elementwise
    samples = process.sample(field, key, a.shape, SolverConfig())                 # x, nfe

K noise draws per sample are a larger batch. Everything is jit-, vmap- and grad-clean.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.flow.paths import AffinePath, time_dtype
from vla_jax.flow.schedules import VP, CondOT, Cosine, LinearVP, Polynomial, Schedule
from vla_jax.flow.solvers import Field, integrate, time_grid
from vla_jax.flow.times import Beta, LogitNormal, TimeSampler, Uniform


class Corrupted(NamedTuple):
    """Training examples of a field: its input (x_t, t), what it should answer, and the noise used."""

    x_t: Float[Array, "b ..."]
    t: Float[Array, "b *k"]
    target: Float[Array, "b ..."]
    noise: Float[Array, "b ..."]


class Samples(NamedTuple):
    """What a solver made, the evaluations of the field it took, and the points on the way if asked for."""

    x: Float[Array, "b ..."]
    nfe: int | Int[Array, ""]
    trajectory: Float[Array, "n b ..."] | None = None


def elementwise(loss: Literal["mse", "l1"], prediction: Array, target: Array) -> Array:
    """Squared or absolute error of every element, in float32 or wider."""
    error = prediction.astype(time_dtype(prediction.dtype)) - target
    return jnp.square(error) if loss == "mse" else jnp.abs(error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow:
    """Flow matching: the field is the velocity from noise to data (Lipman et al. 2210.02747, eq. 9)."""

    schedule: Schedule = dataclasses.field(default_factory=CondOT)
    times: TimeSampler = dataclasses.field(default_factory=TimeSampler)
    criterion: Literal["mse", "l1"] = "mse"

    def corrupt(
        self,
        key: Key[Array, ""],
        a: Float[Array, "b ..."],
        *,
        t: Float[Array, "b *k"] | None = None,
        noise: Float[Array, "b ..."] | None = None,
    ) -> Corrupted:
        """``x_t = alpha a + sigma eps`` with target ``alpha' a + sigma' eps`` (CondOT: ``a - eps``).

        Times and noise are drawn unless given: t [b k] is a time per token, noise comes from a coupling.
        """
        for_noise, for_time = jax.random.split(key)
        if noise is None:
            noise = jax.random.normal(for_noise, a.shape, a.dtype)
        if t is None:
            t = self.times(for_time, a.shape[0], time_dtype(a.dtype))
        point = AffinePath(self.schedule).sample(noise, a, t)
        return Corrupted(point.x_t, t, point.dx_t, noise)

    def loss(self, prediction: Float[Array, "b ..."], target: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Elementwise error; its mean has the marginal velocity as its minimiser (2210.02747, theorem 2)."""
        return elementwise(self.criterion, prediction, target)

    def sample(
        self,
        field: Field,
        key: Key[Array, ""],
        shape: tuple[int, ...],
        solver: SolverConfig,
        *,
        noise: Float[Array, "b ..."] | None = None,
        dtype: jnp.dtype = jnp.float32,
        intermediates: bool = False,
    ) -> Samples:
        """Solve ``dx/dt = field(x, t)`` from noise at t = 0 (drawn from `key` unless given) to t = 1."""
        x = jax.random.normal(key, shape, dtype) if noise is None else noise
        solution = integrate(
            field,
            x,
            time_grid(solver.grid, solver.num_steps),
            method=solver.method,
            unroll=solver.unroll,
            intermediates=intermediates,
        )
        return Samples(solution.x, solver.nfe, solution.trajectory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression:
    """No generation: the field predicts the actions at once. The same model runs it, fed zeros and t = 0."""

    criterion: Literal["mse", "l1"] = "mse"

    def corrupt(self, key: Key[Array, ""], a: Float[Array, "b ..."]) -> Corrupted:
        """Inputs of zeros, and the data as the target. Nothing is drawn from `key`."""
        zeros = jnp.zeros_like(a)
        return Corrupted(zeros, jnp.zeros(a.shape[:1], time_dtype(a.dtype)), a, zeros)

    def loss(self, prediction: Float[Array, "b ..."], target: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Elementwise error; the minimiser of its mean is the conditional mean (mse) or median (l1)."""
        return elementwise(self.criterion, prediction, target)

    def sample(
        self,
        field: Field,
        key: Key[Array, ""],
        shape: tuple[int, ...],
        solver: SolverConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
    ) -> Samples:
        """One evaluation at zeros whatever key and solver are: no randomness, no steps."""
        zeros = jnp.zeros(shape, dtype)
        return Samples(field(zeros, jnp.zeros(shape[:1], time_dtype(dtype))).astype(dtype), 1)


Process = Flow | Regression


def make_schedule(config: ProcessConfig) -> Schedule:
    """The schedule that `config.path` names."""
    schedules = {
        "cond_ot": CondOT(),
        "polynomial": Polynomial(config.power) if config.power > 1 else CondOT(),
        "vp": VP(),
        "linear_vp": LinearVP(),
        "cosine": Cosine(),
    }
    return schedules[config.path]


def make_times(config: ProcessConfig) -> TimeSampler:
    """The time law that `config.time` names, on [t_min, t_max]."""
    laws = {
        "uniform": Uniform(),
        "beta": Beta(a=config.beta),
        "logit_normal": LogitNormal(mean=config.logit_mean, std=config.logit_std),
    }
    return TimeSampler(
        law=laws[config.time], t_min=config.t_min, t_max=config.t_max, stratified=config.stratified
    )


def make_process(config: ProcessConfig) -> Process:
    """The process that a config describes."""
    if config.kind == "regression":
        return Regression(criterion=config.loss)
    return Flow(schedule=make_schedule(config), times=make_times(config), criterion=config.loss)
