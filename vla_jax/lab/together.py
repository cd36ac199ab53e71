"""Many models of one program, side by side: the training step mapped over cells, the cells spread over devices.

All arrays of a state get a leading axis of cells, but for the step, on which all agree; the batch has none. So the
data are read once, the program is compiled once, and branches on the step stay branches.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from vla_jax.config import TrainConfig
from vla_jax.flow.processes import Process
from vla_jax.objectives.terms import Model
from vla_jax.train import spikes
from vla_jax.train.knobs import Knobs
from vla_jax.train.state import InitParams, TrainState, creator
from vla_jax.train.step import add_up, make_eval_step, make_train_step
from vla_jax.train.weigh import Metrics, policy_of
from vla_jax.types import Batch, Device, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cells:
    """The training state of all cells."""

    state: TrainState
    """Every leaf is [cells …], except `step`."""
    skipped: Int[Array, " cells"]
    """Steps without a finite loss or gradient so far."""
    in_a_row: Int[Array, " cells"]
    """How many of them were the last ones."""
    diverged: Bool[Array, " cells"]
    """Whether there ever were train.max_skipped in a row. Its parameters are those before."""

    def items(self) -> dict[str, PyTree]:
        """What a checkpoint holds; see `TrainState.items`."""
        counts = {name: getattr(self, name) for name in ("skipped", "in_a_row", "diverged")}
        return self.state.items() | {"counts": counts}

    @classmethod
    def from_items(cls, step: Int[Array, ""], items: dict[str, PyTree]) -> "Cells":
        """The inverse of `items`."""
        return cls(state=TrainState.from_items(step, items), **items["counts"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Together:
    """The programs of a group of cells. `knobs` are [cells], as many as a multiple of the devices."""

    model: Model
    process: Process
    config: TrainConfig
    """The group's resolved configuration; what differs between cells is in `knobs`."""
    tx: optax.GradientTransformation
    init_params: InitParams
    knobs: Knobs
    devices: tuple[Device, ...]

    @cached_property
    def mesh(self) -> Mesh:
        """All devices in a row."""
        return jax.make_mesh(
            (len(self.devices),), ("cells",), axis_types=(AxisType.Auto,), devices=self.devices
        )

    @property
    def everywhere(self) -> NamedSharding:
        """The place of what all cells share: batches."""
        return NamedSharding(self.mesh, P())

    @cached_property
    def init(self) -> Callable[[], Cells]:
        """Makes the first states of all cells, each from its own seed."""

        def one(knobs: Knobs) -> TrainState:
            policy = policy_of(self.config, knobs.weights)
            ema = self.config.train.ema_decay is not None
            recent = spikes.first(self.config.train)
            create = creator(self.init_params, self.tx, ema=ema, weighting=policy.init, spikes=recent)
            return nn.unbox(create(jax.random.key(knobs.seed)))

        def all_of_them(knobs: Knobs) -> Cells:
            state = jax.vmap(one)(knobs)
            zeros = jnp.zeros(knobs.seed.shape, jnp.int32)
            state = dataclasses.replace(state, step=state.step[0])
            return Cells(state=state, skipped=zeros, in_a_row=zeros, diverged=zeros > 0)

        made = self._on_devices(all_of_them, (P("cells"),), _SPECS)
        return lambda: made(self.knobs)

    @cached_property
    def shapes(self) -> Cells:
        """`jax.ShapeDtypeStruct`s with shardings: the target of a restore."""
        shapes = jax.eval_shape(self.init)
        places = jax.tree.map(lambda x: NamedSharding(self.mesh, P("cells")), shapes)
        step = self.everywhere
        places = dataclasses.replace(places, state=dataclasses.replace(places.state, step=step))
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )

    def compile_step(self, batch: Batch) -> "CompiledStep":
        """The compiled training step; metrics are [cells …]. `memory` of it says what it needs."""
        most = self.config.train.max_skipped
        train_step = make_train_step(self.model, self.process, self.config, self.tx)

        def step(cells: Cells, batch: Batch, knobs: Knobs) -> tuple[Cells, Metrics]:
            mapped = jax.vmap(
                lambda state, knobs: train_step(state, batch, knobs),
                in_axes=(_AXES, 0),
                out_axes=(_AXES, 0),
            )
            state, metrics = mapped(cells.state, knobs)
            skipped = metrics["skipped"].astype(jnp.int32)
            in_a_row = (cells.in_a_row + 1) * skipped
            return Cells(
                state=state,
                skipped=cells.skipped + skipped,
                in_a_row=in_a_row,
                diverged=cells.diverged | (in_a_row >= most),
            ), metrics

        jitted = self._on_devices(step, (_SPECS, P(), P("cells")), (_SPECS, P("cells")), donate_argnums=0)
        compiled = jitted.lower(self.shapes, batch, self.knobs).compile()
        return CompiledStep(compiled, self.knobs)

    @cached_property
    def validate(self) -> Callable[[PyTree, Iterator[Batch]], Metrics]:
        """(parameters, device batches) → metrics [cells …], the same as of each cell's own validation."""
        evaluate = make_eval_step(self.model, self.process, self.config)

        def one_batch(params: PyTree, batch: Batch, i: Int[Array, ""], knobs: Knobs):
            def one(params: PyTree, seed):
                return evaluate(params, batch, jax.random.fold_in(jax.random.key(seed), i))

            return jax.vmap(one)(params, knobs.seed)

        jitted = self._on_devices(one_batch, (P("cells"), P(), P(), P("cells")), P("cells"))

        def validate(params: PyTree, batches: Iterator[Batch]) -> Metrics:
            sums = [jitted(params, batch, jnp.int32(i), self.knobs) for i, batch in enumerate(batches)]
            return jax.vmap(add_up)(sums)

        return validate

    def _on_devices(self, function: Callable, in_specs, out_specs, **options) -> Any:
        """Each device computes its own cells; they have nothing to say to each other."""
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return jax.jit(mapped, **options)


class CompiledStep:
    """A compiled step with its knobs."""

    def __init__(self, compiled, knobs: Knobs):
        self._compiled = compiled
        self._knobs = jax.device_put(knobs, compiled.input_shardings[0][2])

    @property
    def memory(self) -> int:
        """Bytes that it needs on each device, by the compiler's account."""
        found = self._compiled.memory_analysis()
        return (
            found.argument_size_in_bytes
            + found.output_size_in_bytes
            + found.temp_size_in_bytes
            - found.alias_size_in_bytes
        )

    def __call__(self, cells: Cells, batch: Batch) -> tuple[Cells, Metrics]:
        """One step of all cells; metrics are [cells …]."""
        return self._compiled(cells, batch, self._knobs)


def pick(tree: PyTree, cell: int) -> PyTree:
    """One cell's part of stacked arrays, on the host."""
    return jax.tree.map(lambda x: jax.device_get(x[cell]), tree)


def padding(cells: int, devices: Sequence[Device]) -> int:
    """How many copies make the number of cells a multiple of that of the devices."""
    return -cells % len(devices)


def _like_state(step, rest) -> TrainState:
    return TrainState(step=step, params=rest, ema=rest, opt_state=rest, weighting=rest, spikes=rest)


_AXES = _like_state(None, 0)
_CELLS: Any = P("cells")
_SPECS = Cells(state=_like_state(P(), _CELLS), skipped=_CELLS, in_a_row=_CELLS, diverged=_CELLS)
