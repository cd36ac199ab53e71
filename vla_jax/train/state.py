"""The training state, and how it comes to lie on the mesh without ever being whole on one device."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from vla_jax.sharding import activate, shardings
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

    def items(self) -> dict[str, PyTree]:
        """What a checkpoint holds as arrays: each can be restored by itself. The step is metadata."""
        averaged = {} if self.ema is None else {"ema": self.ema}
        remembered = {} if self.weighting is None else {"weighting": self.weighting}
        recent = {} if self.spikes is None else {"spikes": self.spikes}
        return {"params": self.params, "opt_state": self.opt_state} | averaged | remembered | recent

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
        )


InitParams = Callable[[PRNGKeyArray], PyTree]
"""Key → boxed parameters, as ``model.init(key, …)["params"]`` returns them."""


@dataclasses.dataclass(frozen=True)
class StateBuilder:
    """How to make a state on a mesh: the initialiser, the shapes and where each array goes."""

    create: Callable[[PRNGKeyArray], TrainState]
    """Boxed state from a key; not to be called outside jit."""
    shapes: TrainState
    """`jax.ShapeDtypeStruct`s with shardings: the target of a restore."""
    shardings: TrainState
    mesh: Mesh

    def init(self, key: PRNGKeyArray) -> TrainState:
        """A new state. Every device computes only its own shards."""
        with activate(self.mesh):
            return jax.jit(lambda key: nn.unbox(self.create(key)), out_shardings=self.shardings)(key)


def creator(
    init_params: InitParams,
    tx: optax.GradientTransformation,
    *,
    ema: bool,
    weighting: Callable[[], PyTree | None] = lambda: None,
    spikes: Callable[[], PyTree | None] = lambda: None,
) -> Callable[[PRNGKeyArray], TrainState]:
    """Key → boxed first state; `weighting` makes that of the λ policy, `spikes` that of the search for spikes."""

    def create(key: PRNGKeyArray) -> TrainState:
        params = init_params(key)
        average = jax.tree.map(jnp.copy, params) if ema else None
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=average,
            opt_state=tx.init(params),
            weighting=weighting(),
            spikes=spikes(),
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
) -> StateBuilder:
    """Plans a state without computing anything. Raises ValueError where a parameter cannot lie on the mesh.

    `weighting` makes the first state of the λ policy, `spikes` that of the search for spikes.
    """

    create = creator(init_params, tx, ema=ema, weighting=weighting, spikes=spikes)
    boxed = jax.eval_shape(create, jax.random.key(0))
    places = shardings(boxed, mesh)
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), nn.unbox(boxed), places
    )
    return StateBuilder(create, shapes, places, mesh)
