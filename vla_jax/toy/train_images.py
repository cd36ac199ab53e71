"""Flow matching on small pictures: one jitted step, called in chunks so that progress can be seen.

python -m launch.images --config configs/images/shapes.py --out runs/shapes
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from vla_jax.finite import finite
from vla_jax.flow.base import Samples
from vla_jax.flow.config import ProcessConfig, SolverConfig, check
from vla_jax.flow.guidance import classifier_free, drop_condition
from vla_jax.flow.processes import Process, make_process
from vla_jax.models.unet import UNet, UNetConfig
from vla_jax.toy.images import CIFAR_CLASSES, SHAPES, Cifar10, Images, draw_shapes, read_cifar10
from vla_jax.toy.network import answer_of


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class ImagesConfig:
    """One training on pictures."""

    data: Literal["shapes", "cifar10"] = "shapes"
    """shapes are drawn while training; cifar10 is read from `path`."""
    path: Path | None = None
    """cifar10: directory of data_batch_*.bin (the binary version)."""
    model: UNetConfig = UNetConfig()
    process: ProcessConfig = ProcessConfig(time="uniform")
    solver: SolverConfig = SolverConfig(method="midpoint", num_steps=50)
    """How pictures are sampled."""
    steps: int = 1000
    """Training steps."""
    batch_size: int = 128
    """Pictures a step."""
    learning_rate: float = 1e-4
    """Adam's, after a warm-up of a twentieth of the steps, and at most 500."""
    ema: float = 0.999
    """Decay of the parameters' average, which is what samples."""
    seed: int = 0
    """Of parameters, data and noise."""

    def __post_init__(self):
        check(self.process, self.solver)
        if self.process.kind == "regression":
            raise ValueError("process.kind regression generates nothing; use flow or ddpm")
        if self.data == "cifar10" and self.path is None:
            raise ValueError("--data cifar10 needs --path DIRECTORY with data_batch_*.bin")
        if self.data == "shapes" and self.path is not None:
            raise ValueError(f"--path {self.path} is for --data cifar10; shapes are drawn")
        names = SHAPES if self.data == "shapes" else CIFAR_CLASSES
        if self.model.classes not in (0, len(names)):
            raise ValueError(
                f"model.classes {self.model.classes}: {self.data} has {len(names)}; use that, or 0"
            )
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps {self.steps} and batch_size {self.batch_size} must be at least 1")


class UNetState(NamedTuple):
    """All that training changes."""

    params: Any
    optimiser: Any
    average: Any
    """What samples."""
    step: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class ImageTrainer:
    """Functions of one configuration."""

    config: ImagesConfig

    @functools.cached_property
    def process(self) -> Process:
        """Flow matching unless told otherwise."""
        return make_process(self.config.process)

    @functools.cached_property
    def network(self) -> UNet:
        """The U-Net."""
        return UNet(self.config.model)

    @functools.cached_property
    def optimiser(self) -> optax.GradientTransformation:
        """Adam at a constant rate after the warm-up."""
        warmup = min(500, max(1, self.config.steps // 20))
        return optax.adam(optax.linear_schedule(0.0, self.config.learning_rate, warmup))

    def data(self) -> Callable[[int], Images]:
        """Batch number i: a pure function of the seed and i."""
        seed, n = self.config.seed, self.config.batch_size
        if self.config.data == "cifar10":
            assert self.config.path is not None  # the configuration has refused that
            cifar: Cifar10 = read_cifar10(self.config.path)
            return lambda i: cifar.batch(np.random.default_rng([seed, i]), n)
        draw = jax.jit(draw_shapes, static_argnums=1)
        key = jax.random.key(seed)
        return lambda i: draw(jax.random.fold_in(key, i), n)

    @functools.partial(jax.jit, static_argnums=0)
    def init(self) -> UNetState:
        """Fresh parameters."""
        label = jnp.zeros(1, jnp.int32) if self.config.model.classes else None
        key = jax.random.key(self.config.seed)
        params = self.network.init(key, jnp.zeros((1, 32, 32, 3)), jnp.zeros(1), label)
        return UNetState(params, self.optimiser.init(params), params, jnp.zeros((), jnp.int32))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, state: UNetState, batch: Images) -> tuple[UNetState, Float[Array, ""]]:
        """(state, loss) after one batch."""
        key = jax.random.fold_in(jax.random.key(self.config.seed + 1), state.step)
        for_process, for_drop, for_dropout = jax.random.split(key, 3)
        label = None
        if self.config.model.classes:
            label = drop_condition(for_drop, batch.label, jnp.asarray(self.config.model.classes), 0.1)
        example = self.process.corrupt(for_process, batch.x)

        def loss(params):
            answer = answer_of(
                self.network, params, example.x_t, example.t, label, train=True, rngs={"dropout": for_dropout}
            )
            return self.process.loss(answer, example.target).mean()

        value, gradient = jax.value_and_grad(loss)(state.params)
        updates, optimiser = self.optimiser.update(gradient, state.optimiser)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(self.config.ema, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, state.average, 1 - decay)
        return UNetState(params, optimiser, average, state.step + 1), value

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def sample(
        self,
        params: Any,
        key: Key[Array, ""],
        n: int,
        label: Int[Array, " n"] | None = None,
        w: float | Float[Array, ""] = 1.0,
    ) -> Samples:
        """`n` pictures in [-1, 1], clipped; with labels, guided by `w`."""

        def field(x, t, label=None):
            return answer_of(self.network, params, x, t, label)

        null = jnp.asarray(self.config.model.classes)
        guided = field if label is None else classifier_free(field, label, null, w)
        samples = self.process.sample(guided, key, (n, 32, 32, 3), self.config.solver)
        return samples._replace(x=jnp.clip(samples.x, -1, 1))
