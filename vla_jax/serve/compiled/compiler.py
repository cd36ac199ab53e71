"""Executables of the one program, compiled ahead of time, one per `Shape`; calling one compiles nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vla_jax.flow.config import SolverConfig
from vla_jax.serve.compiled import solve
from vla_jax.serve.compiled.network import Prefix
from vla_jax.serve.compiled.program import Inputs, Program, Shape, Text
from vla_jax.serve.sampling import Overlap
from vla_jax.sharding.mesh import batch_sharding, batch_shards, replicated
from vla_jax.sharding.rules import activate
from vla_jax.types import PyTree


class Compiler:
    """Weights on their devices, and the executables that were made for them."""

    def __init__(self, program: Program, weights: PyTree, mesh: Mesh | None):
        self.program, self.mesh, self.weights = program, mesh, weights
        self._executables: dict[Shape, Any] = {}
        self._conditions: dict[SolverConfig, Any] = {}

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Those that are compiled."""
        return tuple(self._executables)

    def executable(self, shape: Shape) -> Any:
        """The compiled program of a shape, made at its first use."""
        if shape not in self._executables:
            self._executables[shape] = self.lower(shape).compile()
        return self._executables[shape]

    def __call__(self, shape: Shape, inputs: Inputs, prefix: Prefix | None = None) -> Any:
        """Runs it; arrays stay on the device."""
        return self.executable(shape)(self.weights, self.conditions(shape.solver), inputs, prefix)

    def conditions(self, solver: SolverConfig) -> Any:
        """The conditioning at a solver's times, computed at its first use."""
        if solver not in self._conditions:
            program = self.program
            found = solve.schedule(self.weights["expert"], program.network, program.process, solver)
            self._conditions[solver] = found if self.mesh is None else _put(found, replicated(self.mesh))
        return self._conditions[solver]

    def lower(self, shape: Shape) -> jax.stages.Lowered:
        """The program of a shape, not compiled yet."""
        inputs, prefix = self.abstract(shape)
        jitted = jax.jit(lambda w, c, i, p: self.program.act(w, c, i, p, shape))
        arguments = (self.weights, self.conditions(shape.solver), inputs, prefix)
        if self.mesh is None:
            return jitted.lower(*arguments)
        with activate(self.mesh):
            return jitted.lower(*arguments)

    def abstract(self, shape: Shape) -> tuple[Inputs, Prefix | None]:
        """Shapes, types and places of the inputs."""
        network, scaling = self.program.network, self.program.scaling
        b, length = shape.rows, shape.length
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        texts = b * (1 + shape.guided)
        if network.rewrites.embeddings:
            tokens = self.array((texts, length, network.model.backbone.text.width), jnp.dtype(network.dtype))
        else:
            tokens = self.array((texts, length), np.int32)
        mask = self.array((texts, length), bool)
        inputs = Inputs(
            images=tuple(self.array((b, h, w, 3), np.uint8) for _, h, w in shape.cameras),
            present=self.array((len(shape.cameras),), bool, batched=False),
            text=Text(tokens, mask, mask if shape.sees else None),
            state=self.array((b, scaling.state.offset.shape[-1]), np.float32),
            group=self.array((b,), np.int32),
            key=self.array((b, *key.shape), key.dtype, batched=False),
            number=self.array((b,), np.int32, batched=False),
            guidance=self.array((b,), np.float32) if shape.guided else None,
            overlap=None if shape.continues is None else self._overlap(shape),
        )
        if not shape.again:
            return inputs, None
        first = shape._replace(again=False, keep=True)
        _, prefix = jax.eval_shape(
            lambda w, c, i: self.program.act(w, c, i, None, first),
            self.weights, self.conditions(shape.solver), self.abstract(first)[0],
        )  # fmt: skip
        return inputs._replace(images=(), text=None), prefix

    def _overlap(self, shape: Shape) -> Overlap:
        horizon, dims = self.program.network.model.expert.horizon, self.program.scaling.known.offset.shape[-1]
        return Overlap(
            known=self.array((shape.rows, horizon, dims), np.float32),
            weight=self.array((shape.rows, horizon), np.float32),
            bound=self.array((), np.float32, batched=False),
            how=shape.continues,
        )

    def array(self, shape: tuple[int, ...], dtype: Any, *, batched: bool = True) -> jax.ShapeDtypeStruct:
        """An abstract input, and its place on the mesh."""
        if self.mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        split = batched and shape[0] % batch_shards(self.mesh) == 0
        place = batch_sharding(self.mesh) if split else replicated(self.mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _put(tree: PyTree, place: NamedSharding) -> PyTree:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, place), tree)
