"""The program's parts as programs of their own, for whoever wants to know which of them takes how long."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from vla_jax.serve.compiled.encode import Encoded
from vla_jax.serve.compiled.policy import CompiledPolicy
from vla_jax.serve.compiled.program import Shape

Part = Literal["vision", "prefill", "denoise"]


class Parts:
    """Vision, prefill and denoise of one shape with inputs that lie on the device."""

    def __init__(self, compiled: CompiledPolicy, shape: Shape, rows: Sequence[Encoded]):
        compiler = compiled.compiler
        program, weights = compiler.program, compiler.weights
        inputs = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, getattr(like, "sharding", None)),
            compiled.inputs(rows, shape),
            compiler.abstract(shape)[0],
        )
        conditions = compiler.conditions(shape.solver)
        vision = jax.jit(lambda weights, inputs: program.vision(weights, inputs, shape))
        prefill = jax.jit(program.prefill)
        denoise = jax.jit(lambda w, c, prefix, inputs: program.denoise(w, c, prefix, inputs, shape))
        tokens = vision(weights, inputs)
        prefix = prefill(weights, tokens, inputs)
        self._calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
            "vision": (vision, (weights, inputs)),
            "prefill": (prefill, (weights, tokens, inputs)),
            "denoise": (denoise, (weights, conditions, prefix, inputs)),
        }

    def call(self, part: Part) -> Callable[[], None]:
        """Runs a part and waits for it."""
        function, arguments = self._calls[part]

        def once() -> None:
            jax.block_until_ready(function(*arguments))

        return once
