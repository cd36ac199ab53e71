"""The training state, and how it comes to lie on the mesh without ever being whole on one device."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from vla_jax.checkpoint.tree import join, split
from vla_jax.sharding import activate, shardings
from vla_jax.sharding.rules import is_box, path_name
from vla_jax.types import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step changes."""

    step: Int[Array, ""]
    """Steps done, skipped ones included; with the seed it decides all randomness and the data."""
    params: PyTree
    ema: PyTree | None
    """Exponential moving average of the parameters; None where none is kept."""
    opt_state: optax.OptState
    weighting: PyTree | None = None
    """What the λ policy remembers, scalars; None where it remembers nothing."""
    spikes: PyTree | None = None
    """The last losses and gradient norms (`spikes.py`); None where spikes are not looked for."""
    frozen: PyTree | None = None
    """Parameters that no step changes, under names that `params` lacks; None where all are trained."""

    def whole(self, *, averaged: bool) -> PyTree:
        """All parameters, of the trained ones their average where asked for and kept."""
        return join(self.ema if averaged and self.ema is not None else self.params, self.frozen)

    def items(self) -> dict[str, PyTree]:
        """What a checkpoint holds as arrays: each can be restored by itself. The step is metadata."""
        averaged = {} if self.ema is None else {"ema": self.ema}
        remembered = {} if self.weighting is None else {"weighting": self.weighting}
        recent = {} if self.spikes is None else {"spikes": self.spikes}
        frozen = {} if self.frozen is None else {"frozen": self.frozen}
        needed = {"params": self.params, "opt_state": self.opt_state}
        return needed | averaged | remembered | recent | frozen

    @classmethod
    def from_items(cls, step: Int[Array, ""], items: dict[str, PyTree]) -> "TrainState":
        """The inverse of `items`."""
        return cls(
            step=step,
            params=items["params"],
            ema=items.get("ema"),
            opt_state=items["opt_state"],
            weighting=items.get("weighting"),
            spikes=items.get("spikes"),
            frozen=items.get("frozen"),
        )


InitParams = Callable[[PRNGKeyArray], PyTree]
"""Key → boxed parameters, as ``model.init(key, …)["params"]`` returns them."""


@dataclasses.dataclass(frozen=True)
class StateBuilder:
    """How to make a state on a mesh: the initialiser, the shapes and where each array goes."""

    create: Callable[..., TrainState]
    """Boxed state from a key and the arrays, by path, that are given; not to be called outside jit."""
    shapes: TrainState
    """`jax.ShapeDtypeStruct`s with shardings: the target of a restore."""
    shardings: TrainState
    mesh: Mesh

    def init(self, key: PRNGKeyArray, given: dict[str, Array] | None = None) -> TrainState:
        """A new state; every device computes only its own shards. `given` parameters, by path, are not drawn."""
        with activate(self.mesh):
            create = jax.jit(lambda *args: nn.unbox(self.create(*args)), out_shardings=self.shardings)
            return create(key, given or {})


def creator(
    init_params: InitParams,
    tx: optax.GradientTransformation,
    *,
    ema: bool,
    weighting: Callable[[], PyTree | None] = lambda: None,
    spikes: Callable[[], PyTree | None] = lambda: None,
    frozen: Collection[str] = (),
    frozen_dtype: str = "float32",
) -> Callable[..., TrainState]:
    """(Key, parameters by path that are given and not drawn) → boxed first state; see `state_builder`."""

    def create(key: PRNGKeyArray, given: Mapping[str, Array] = MappingProxyType({})) -> TrainState:
        params = init_params(key)
        if given:
            params = jax.tree_util.tree_map_with_path(
                lambda path, leaf: _replaced(leaf, given.get(path_name(path))), params, is_leaf=is_box
            )
        held = None
        if frozen:
            held, params = split(params, frozen.__contains__)
            held = jax.tree.map(lambda x: x.astype(frozen_dtype), held)
        average = jax.tree.map(jnp.copy, params) if ema else None
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=average,
            opt_state=tx.init(params),
            weighting=weighting(),
            spikes=spikes(),
            frozen=held,
        )

    return create


def state_builder(
    init_params: InitParams,
    tx: optax.GradientTransformation,
    *,
    ema: bool,
    mesh: Mesh,
    weighting: Callable[[], PyTree | None] = lambda: None,
    spikes: Callable[[], PyTree | None] = lambda: None,
    frozen: Collection[str] = (),
    frozen_dtype: str = "float32",
) -> StateBuilder:
    """Plans a state without computing anything. Raises ValueError where a parameter cannot lie on the mesh.

    `weighting` makes the first state of the λ policy, `spikes` that of the search for spikes; `frozen` are the paths of
    parameters that are not trained.
    """

    create = creator(
        init_params,
        tx,
        ema=ema,
        weighting=weighting,
        spikes=spikes,
        frozen=frozen,
        frozen_dtype=frozen_dtype,
    )
    boxed = jax.eval_shape(create, jax.random.key(0))
    places = shardings(boxed, mesh)
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), nn.unbox(boxed), places
    )
    return StateBuilder(create, shapes, places, mesh)


def _replaced(leaf: Any, value: Array | None) -> Any:
    """A leaf, boxed or not, with another value of the same type."""
    if value is None:
        return leaf
    return leaf.replace_boxed(value.astype(leaf.unbox().dtype)) if is_box(leaf) else value.astype(leaf.dtype)
