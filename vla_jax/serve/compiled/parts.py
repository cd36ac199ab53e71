"""The program's parts as programs of their own, for whoever wants to know which of them takes how long."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from vla_jax.serve.compiled.encode import Encoded
from vla_jax.serve.compiled.program import Shape
from vla_jax.serve.compiled.runner import ProgramRunner

Part = Literal["vision", "prefill", "denoise"]


class TimedParts:
    """Vision, prefill (vision with it) and denoise of one shape, with inputs that lie on the device."""

    def __init__(self, runner: ProgramRunner, shape: Shape, rows: Sequence[Encoded]):
        compiler = runner.compiler
        program, params = compiler.program, compiler.params
        inputs = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, getattr(like, "sharding", None)),
            runner.inputs(rows, shape),
            compiler.abstract(shape)[0],
        )
        schedule = compiler.schedule(shape.solver)
        vision = jax.jit(lambda p, i: program.encode_images(p, i, shape))
        prefill = jax.jit(lambda p, i: program.prefill(p, i, shape))
        denoise = jax.jit(lambda p, s, c, i: program.denoise(p, s, c, i, shape))
        self._calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
            "vision": (vision, (params, inputs)),
            "prefill": (prefill, (params, inputs)),
            "denoise": (denoise, (params, schedule, prefill(params, inputs), inputs)),
        }

    def call(self, part: Part) -> Callable[[], None]:
        """Runs a part and waits for it."""
        function, arguments = self._calls[part]

        def once() -> None:
            jax.block_until_ready(function(*arguments))

        return once
