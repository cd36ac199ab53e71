"""Training in the plane: the whole of it is one `lax.scan` over fresh data, compiled once.

    trained = train(LAWS["checkerboard"], ToyConfig(), seed=0)
    samples = trained.sample(jax.random.key(1), 4096, SolverConfig(method="midpoint", num_steps=20))

What helped most, measured on the checkerboard: the network's features (`network.py`), then more times near data,
where the edges are (`logit_normal`), an average of the parameters, and a learning rate that ends at zero.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from vla_jax.finite import finite
from vla_jax.flow.base import Samples
from vla_jax.flow.config import (
    PathName,
    PredictionName,
    ProcessConfig,
    SolverConfig,
    TimeName,
    check,
    require,
)
from vla_jax.flow.diffusion import Diffusion
from vla_jax.flow.guidance import classifier_free, drop_condition
from vla_jax.flow.meanflow import MeanFlow
from vla_jax.flow.paths import align
from vla_jax.flow.predictions import data_and_noise
from vla_jax.flow.processes import Flow, Regression, make_process
from vla_jax.flow.schedules import CondOT
from vla_jax.flow.solvers import Field
from vla_jax.toy.laws import Law
from vla_jax.toy.network import Informed, Plain, answer_of

ProcessName = Literal["flow", "ddpm", "score", "meanflow"]
LAST_TIME = 0.999
"""Nearest to data that flows are trained on; likelihoods ask no nearer either."""


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class ToyConfig:
    """One training in the plane."""

    process: ProcessName = "flow"
    """flow: velocity. ddpm: noise (or x1, v). score: denoising score matching. meanflow: one step."""
    path: PathName | None = None
    """From noise to data: cond_ot, vp, cosine, …. None: cond_ot for flow, ddpm_linear for ddpm, vp for score."""
    prediction: PredictionName | None = None
    """ddpm: what the network predicts, eps (None), x1 or v."""
    time: TimeName | None = None
    """Law of t in training. None: logit_normal (mean 1, std 1.3: more near data) for flow, uniform for others."""
    network: Literal["informed", "plain"] = "informed"
    """plain is the tutorials' ReLU network of [x, t]; informed knows the data's spread and sees waves."""
    width: int | None = None
    """Units of a layer. None: 256, plain 128."""
    depth: int | None = None
    """Hidden layers. None: 3, plain 2."""
    conditional: bool = False
    """Learn the classes of moons and gmm too; one in ten is hidden in training, so that guidance can be used."""
    steps: int = 3000
    """Training steps, each on fresh data."""
    batch_size: int = 1024
    """Points a step."""
    learning_rate: float = 2e-3
    """Adam's; rises over 200 steps (or a tenth) and falls to zero along a cosine."""
    ema: float = 0.998
    """Decay of the parameters' average, which is what samples; 0 takes the last parameters."""

    def __post_init__(self):
        require(self.process, ProcessName, "--process")
        if self.process == "meanflow" and (self.path, self.time) != (None, None):
            raise ValueError(
                "--process meanflow has a path and a law of t of its own; leave out path and time"
            )
        if self.prediction is not None and self.process != "ddpm":
            raise ValueError(f"--prediction {self.prediction} is for --process ddpm, not {self.process}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.process != "meanflow":
            self.process_config()

    def process_config(self) -> ProcessConfig:
        """The process in `flow`'s own words."""
        if self.process == "flow":
            return ProcessConfig(
                path=self.path or "cond_ot",
                time=self.time or "logit_normal",
                logit_mean=1.0,
                logit_std=1.3,
                t_max=LAST_TIME,
                stratified=True,
            )
        score = self.process == "score"
        return ProcessConfig(
            kind="ddpm",
            path=self.path or ("vp" if score else "ddpm_linear"),
            prediction="score" if score else self.prediction or "eps",
            time=self.time or "uniform",
            t_max=1.0,
            stratified=True,
        )

    def make(self, law: Law) -> tuple[Flow | Diffusion | MeanFlow, nn.Module]:
        """The process and the network."""
        if self.conditional and law.classes == 1:
            raise ValueError(f"--conditional: {law.name} has no classes; use moons or gmm")
        process = MeanFlow() if self.process == "meanflow" else make_process(self.process_config())
        assert not isinstance(process, Regression)  # --process has none
        classes = law.classes if self.conditional else 1
        if self.network == "plain":
            return process, Plain(width=self.width or 128, depth=self.depth or 2, classes=classes)
        return process, Informed(
            schedule=CondOT() if isinstance(process, MeanFlow) else process.schedule,
            kind=process.prediction if isinstance(process, Diffusion) else "velocity",
            spread=law.spread,
            width=self.width or 256,
            depth=self.depth or 3,
            classes=classes,
        )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network and all that it takes to use it."""

    law: Law
    config: ToyConfig
    process: Flow | Diffusion | MeanFlow
    network: nn.Module
    params: Any
    losses: Float[np.ndarray, " steps"]

    def predict(
        self,
        x: Float[Array, "n 2"],
        t: Float[Array, " n"],
        label: Int[Array, " n"] | None = None,
        s: Float[Array, " n"] | None = None,
    ) -> Float[Array, "n 2"]:
        """The network's answer; without labels, that for "no class"."""
        if label is None:
            label = jnp.full(x.shape[0], self.law.classes if self.config.conditional else 0)
        if isinstance(self.process, MeanFlow):
            return answer_of(self.network, self.params, x, t, label, t if s is None else s)
        return answer_of(self.network, self.params, x, t, label)

    def sample(
        self,
        key: Key[Array, ""],
        n: int,
        solver: SolverConfig,
        *,
        label: Int[Array, " n"] | None = None,
        w: float | Float[Array, ""] = 1.0,
        intermediates: bool = False,
    ) -> Samples:
        """`n` samples; with labels, guided by `w`. meanflow jumps num_steps times (method euler)."""
        if isinstance(self.process, MeanFlow):
            if solver.method != "euler" or intermediates or label is not None:
                raise ValueError("--process meanflow jumps: method euler, no way between, no guidance")
            mean_velocity = lambda x, t, s: self.predict(x, t, None, s)  # noqa: E731
            return self.process.sample(mean_velocity, key, (n, 2), num_steps=solver.num_steps)
        check(self.config.process_config(), solver)
        field: Field = self.predict
        if label is not None:
            field = classifier_free(self.predict, label, jnp.asarray(self.law.classes), w)
        return self.process.sample(field, key, (n, 2), solver, intermediates=intermediates)

    def velocity(self, x: Float[Array, "n 2"], r: Float[Array, " n"]) -> Float[Array, "n 2"]:
        """The probability-flow velocity on the straight path at time r, whatever was learned.

        As `flow.transform.change_schedule`: asked at the same signal-to-noise ratio, the network says what data and
        noise it sees, and their difference is the velocity. MeanFlow's is its u(x, t, t).
        """
        if isinstance(self.process, MeanFlow):
            return self.predict(x, jnp.minimum(r, LAST_TIME))
        schedule = self.process.schedule
        t = jnp.minimum(schedule.inverse_log_snr(CondOT().log_snr(r)), LAST_TIME)
        scale = jnp.hypot(r, 1 - r) / jnp.hypot(schedule.alpha(t), schedule.sigma(t))
        x_t = x / align(scale, x)
        if isinstance(self.process, Diffusion):
            x1, eps = self.process.data_and_noise(self.predict, x_t, t)
        else:
            x1, eps = data_and_noise(schedule, "velocity", self.predict(x_t, t), x_t, t)
        return x1 - eps


def train(law: Law, config: ToyConfig, *, seed: int) -> Trained:
    """Trains a network on fresh samples of `law`."""
    process, network = config.make(law)
    params, losses = _scan(law, config, jax.random.key(seed))
    return Trained(law, config, process, network, params, np.asarray(losses))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan(law: Law, config: ToyConfig, key: Key[Array, ""]) -> tuple[Any, Float[Array, " steps"]]:
    """(averaged parameters, loss of every step)."""
    process, network = config.make(law)
    for_init, for_steps = jax.random.split(key)
    one = jnp.zeros(1)
    ends = (one,) if isinstance(process, MeanFlow) else ()
    params = network.init(for_init, jnp.zeros((1, 2)), one, jnp.zeros(1, jnp.int32), *ends)
    warmup = min(200, max(1, config.steps // 10))
    optimiser = optax.adam(
        optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(config.steps, warmup + 1))
    )

    def loss(params, key):
        for_data, for_process, for_drop = jax.random.split(key, 3)
        x, label = law.sample(for_data, config.batch_size)
        if config.conditional:
            label = drop_condition(for_drop, label, jnp.asarray(law.classes), 0.1)
        if isinstance(process, MeanFlow):
            example = process.corrupt(for_process, x)
            return process.loss(lambda x, t, s: answer_of(network, params, x, t, label, s), example).mean()
        example = process.corrupt(for_process, x)
        return process.loss(answer_of(network, params, example.x_t, example.t, label), example.target).mean()

    def step(state, inputs):
        params, optimiser_state, average = state
        i, key = inputs
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, optimiser_state = optimiser.update(gradient, optimiser_state)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(config.ema, (1 + i) / (10 + i))  # the first steps do not last
        average = optax.incremental_update(params, average, 1 - decay)
        return (params, optimiser_state, average), value

    steps = jnp.arange(config.steps), jax.random.split(for_steps, config.steps)
    (_, _, average), losses = jax.lax.scan(step, (params, optimiser.init(params), params), steps)
    return average, losses
