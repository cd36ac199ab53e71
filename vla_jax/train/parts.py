"""Which parameters are trained: what optim.freeze and LoRA leave, and the network over both parts.

A run has one tree of parameters in two parts without a common leaf: `TrainState.params`, which is differentiated,
averaged and has optimiser state, and `TrainState.frozen`, which is only read. LoRA adds leaves to the first and moves
the matrices that it adapts to the second.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from vla_jax.checkpoint.tree import join
from vla_jax.config import TrainConfig
from vla_jax.layers import lora
from vla_jax.layers.matrices import matrix_axes
from vla_jax.models.vla import VLA
from vla_jax.objectives.terms import Model
from vla_jax.train.patterns import choose, fits, leaf_names
from vla_jax.train.state import InitParams
from vla_jax.types import Batch, PyTree

LORA_KEY = 0x10FA
"""Folded into a run's key for A, so that all other parameters start as without LoRA."""

EXPERT_LAYERS = "expert/layers/**"
"""What LoRA adapts of an expert unless told otherwise; a policy that writes tokens has none."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is trained of a model."""

    init: InitParams
    """Key → all parameters, LoRA's with them."""
    frozen: frozenset[str]
    """Paths of those that are not trained."""


def init_params(model: VLA, example: Batch, batch_size: int | None = None) -> InitParams:
    """Key → boxed parameters. Only the shapes of `example` matter, a part of a batch of `batch_size` (or all)."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch_size or x.shape[0], *x.shape[1:]), x.dtype), example
    )

    def init(key: PRNGKeyArray) -> PyTree:
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        t = jnp.zeros(batch.tokens.shape[:1])
        return model.init(key, batch, batch.actions, t)["params"]

    return init


def make_parts(init_params: InitParams, config: TrainConfig) -> Parts:
    """Raises ValueError where a pattern names no parameter, or nothing is left to train."""
    names = leaf_names(jax.eval_shape(init_params, jax.random.key(0)))
    frozen = choose(names, config.optim.freeze, "optim.freeze")
    if not config.lora.rank:
        if len(frozen) == len(names):
            raise ValueError(f"optim.freeze={config.optim.freeze} leaves nothing to train")
        return Parts(init_params, frozen)
    named = choose(names, _modules(config, names), "lora.modules")
    matrices = {name for name in named - frozen if matrix_axes(name) is not None}
    if not matrices:
        raise ValueError(f"lora.modules={_modules(config, names)} names no matrix that optim.freeze leaves")

    def init(key: PRNGKeyArray) -> PyTree:
        return lora.attach(jax.random.fold_in(key, LORA_KEY), init_params(key), matrices, config.lora.rank)

    return Parts(init, frozen | named)


def _modules(config: TrainConfig, names: list[str]) -> tuple[str, ...]:
    if config.lora.modules:
        return config.lora.modules
    expert = any(fits(name, EXPERT_LAYERS) for name in names)
    return ("backbone/**", EXPERT_LAYERS) if expert else ("backbone/**",)


def network(model: Model, frozen: PyTree | None, scale: float) -> Model:
    """The model over the trained parameters alone: frozen ones are joined, LoRA's B are multiplied by `scale`."""
    return model if frozen is None and not scale else _Network(model, frozen, scale)


@dataclasses.dataclass(frozen=True, eq=False)
class _Network:
    model: Model
    frozen: PyTree | None
    scale: float

    def apply(self, variables: PyTree, *args: Any, **kwargs: Any) -> Any:
        """The model's own, with all parameters. What a method does not read of them is not computed either."""
        params = lora.scaled(join(variables["params"], self.frozen), self.scale)
        return self.model.apply({"params": params}, *args, **kwargs)
