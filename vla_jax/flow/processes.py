"""Processes: what is done to data in training, what a field predicts, how it is sampled.

Every process is a small frozen dataclass with the same three methods, so that a model, an objective and a
policy need not know which one they hold:

    corrupted = process.corrupt(key, a)                    # x_t, t, target, noise
    loss = process.loss(field(corrupted.x_t, corrupted.t), corrupted.target)      # elementwise
    samples = process.sample(field, key, a.shape, SolverConfig())                 # x, nfe

`sample` takes one key for the whole batch, or one for each row (or each group of consecutive rows).
K noise draws per sample are a larger batch. Everything is jit-, vmap- and grad-clean.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from vla_jax.flow.base import Corrupted, Samples, elementwise, noise_and_time, solve, start
from vla_jax.flow.config import STOCHASTIC, ProcessConfig, SolverConfig
from vla_jax.flow.couplings import sinkhorn_pairs
from vla_jax.flow.diffusion import Diffusion
from vla_jax.flow.paths import AffinePath, time_dtype
from vla_jax.flow.schedules import VP, CondOT, Cosine, LinearVP, Polynomial, Schedule
from vla_jax.flow.solvers import Field
from vla_jax.flow.step_schedules import CosineSteps, LinearSteps
from vla_jax.flow.times import Beta, LogitNormal, TimeSampler, Uniform
from vla_jax.types import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow:
    """Flow matching: the field is the velocity from noise to data (Lipman et al. 2210.02747, eq. 9)."""

    schedule: Schedule = dataclasses.field(default_factory=CondOT)
    times: TimeSampler = dataclasses.field(default_factory=TimeSampler)
    coupling: Literal["independent", "sinkhorn"] = "independent"
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

        Times and noise are drawn unless given: t [b k] is a time per token; given noise is used as it is, paired
        already, e.g. by `couplings.exact_pairs` in a data thread.
        """
        unpaired = noise is None
        noise, t = noise_and_time(key, a, self.times, noise, t)
        if unpaired and self.coupling == "sinkhorn":
            noise = noise[sinkhorn_pairs(noise, a)]
        point = AffinePath(self.schedule).sample(noise, a, t)
        return Corrupted(point.x_t, t, point.dx_t, noise)

    def loss(self, prediction: Float[Array, "b ..."], target: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Elementwise error; its mean has the marginal velocity as its minimiser (2210.02747, theorem 2)."""
        return elementwise(self.criterion, prediction, target)

    def sample(
        self,
        field: Field,
        key: Key[Array, "*n"],
        shape: tuple[int, ...],
        solver: SolverConfig,
        *,
        noise: Float[Array, "b ..."] | None = None,
        dtype: DTypeLike = jnp.float32,
        intermediates: bool = False,
        stages: PyTree = None,
    ) -> Samples:
        """Solve ``dx/dt = field(x, t)`` from noise at t = 0 (drawn from `key` unless given) to t = 1.

        `stages`: see `solvers.integrate`.
        """
        if solver.method in STOCHASTIC:
            raise ValueError(f"solver.method {solver.method} samples a ddpm process, not flow; use euler")
        x = start(key, shape, dtype, noise)
        return solve(field, x, solver, intermediates=intermediates, stages=stages)


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
        key: Key[Array, "*n"],
        shape: tuple[int, ...],
        solver: SolverConfig,
        *,
        dtype: DTypeLike = jnp.float32,
    ) -> Samples:
        """One evaluation at zeros whatever key and solver are: no randomness, no steps."""
        zeros = jnp.zeros(shape, dtype)
        return Samples(field(zeros, jnp.zeros(shape[:1], time_dtype(dtype))).astype(dtype), 1)


Process = Flow | Diffusion | Regression


def make_schedule(config: ProcessConfig) -> Schedule:
    """The schedule that `config.path` names."""
    schedules = {
        "cond_ot": CondOT,
        "polynomial": lambda: Polynomial(config.power),
        "vp": VP,
        "linear_vp": LinearVP,
        "cosine": Cosine,
        "ddpm_linear": lambda: LinearSteps(config.diffusion_steps),
        "ddpm_cosine": lambda: CosineSteps(config.diffusion_steps),
    }
    return schedules[config.path]()


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
    schedule, times = make_schedule(config), make_times(config)
    if config.kind == "ddpm":
        return Diffusion(
            schedule=schedule,
            times=times,
            prediction=config.prediction,
            clip=config.clip,
            criterion=config.loss,
        )
    return Flow(schedule=schedule, times=times, coupling=config.coupling, criterion=config.loss)
