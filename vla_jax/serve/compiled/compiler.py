"""Executables of the one program, compiled ahead of time, one per `Shape`; calling one compiles nothing."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vla_jax.flow.config import SolverConfig
from vla_jax.serve.compiled.program import Inputs, PolicyProgram, Shape, Text
from vla_jax.serve.sampling import Continuation, Overlap
from vla_jax.serve.schedule import ConditionTable, make_schedule
from vla_jax.sharding.mesh import batch_sharding, batch_shards, replicated
from vla_jax.sharding.rules import activate
from vla_jax.types import Context, PyTree


class Compiler:
    """Parameters on their devices, and the executables that were made for them."""

    def __init__(self, program: PolicyProgram, params: PyTree, mesh: Mesh | None):
        self.program, self.mesh, self.params = program, mesh, params
        self._executables: dict[Shape, Any] = {}
        self._schedules: dict[SolverConfig, ConditionTable | None] = {}

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes whose executable is there, so that a call with them compiles nothing."""
        return tuple(self._executables)

    def executable(self, shape: Shape) -> Any:
        """The compiled program of a shape, made at its first use."""
        if shape not in self._executables:
            self._executables[shape] = self.lower(shape).compile()
        return self._executables[shape]

    def __call__(self, shape: Shape, inputs: Inputs, context: Context | None = None) -> Any:
        """Runs it; arrays stay on the device."""
        return self.executable(shape)(self.params, self.schedule(shape.solver), inputs, context)

    def schedule(self, solver: SolverConfig) -> ConditionTable | None:
        """What the network knows of a solver's times, computed at its first use; None: at every evaluation."""
        if not self.program.rewrites.time:
            return None
        if solver not in self._schedules:
            found = make_schedule(self.program.model(), self.params, self.program.process, solver)
            if self.mesh is not None:
                found = jax.device_put(found, replicated(self.mesh))
            self._schedules[solver] = found
        return self._schedules[solver]

    def lower(self, shape: Shape) -> jax.stages.Lowered:
        """The program of a shape, not compiled yet."""
        inputs, context = self.abstract(shape)
        jitted = jax.jit(lambda p, s, i, c: self.program.act(p, s, i, c, shape))
        arguments = (self.params, self.schedule(shape.solver), inputs, context)
        if self.mesh is None:
            return jitted.lower(*arguments)
        with activate(self.mesh):
            return jitted.lower(*arguments)

    def abstract(self, shape: Shape) -> tuple[Inputs, Context | None]:
        """Shapes, types and places of the inputs."""
        b, length, scaling = shape.rows, shape.length, self.program.scaling
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        texts = b * (1 + shape.guided)
        mask = self.array((texts, length), bool)
        inputs = Inputs(
            images=tuple(self.array((b, h, w, 3), np.uint8) for _, h, w in shape.cameras),
            present=self.array((len(shape.cameras),), bool, batched=False),
            text=Text(self.array((texts, length), np.int32), mask, mask if shape.plan_visible else None),
            state=self.array((b, scaling.state.offset.shape[-1]), np.float32),
            group=self.array((b,), np.int32),
            key=self.array((b, *key.shape), key.dtype, batched=False),
            number=self.array((b,), np.int32, batched=False),
            guidance=self.array((b,), np.float32) if shape.guided else None,
            overlap=None if shape.continues is None else self._overlap(shape, shape.continues),
        )
        if not shape.again:
            return inputs, None
        context = jax.eval_shape(lambda p, i: self.program.prefill(p, i, shape), self.params, inputs)
        return inputs._replace(images=(), text=None), context

    def _overlap(self, shape: Shape, how: Continuation) -> Overlap:
        horizon, dims = self.program.config.expert.horizon, self.program.scaling.known.offset.shape[-1]
        return Overlap(
            known=self.array((shape.rows, horizon, dims), np.float32),
            weight=self.array((shape.rows, horizon), np.float32),
            bound=self.array((), np.float32, batched=False),
            how=how,
        )

    def array(self, shape: tuple[int, ...], dtype: Any, *, batched: bool = True) -> Any:
        """An abstract input, and its place on the mesh: a ShapeDtypeStruct where arrays are declared."""
        if self.mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        split = batched and shape[0] % batch_shards(self.mesh) == 0
        place = batch_sharding(self.mesh) if split else replicated(self.mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
