"""``--profile 20:25`` traces some steps for TensorBoard's and XProf's trace viewer."""

import dataclasses
import re

import jax

from vla_jax.checkpoint.paths import Path


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps start … stop, counted as in the log, from 1."""

    start: int
    stop: int


def parse(text: str) -> Steps:
    """``start:stop``, both included. Raises ValueError."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    steps = Steps(*map(int, found.groups())) if found else None
    if steps is None or not 1 <= steps.start <= steps.stop:
        raise ValueError(
            f"--profile {text}: give START:STOP, the first and the last step to trace, from 1 on"
        )
    return steps


class Profiler:
    """Switches the trace of process 0's devices on and off; with `steps` None it does nothing."""

    def __init__(self, steps: Steps | None, folder: Path):
        self._steps = None if jax.process_index() else steps
        self._folder, self._on = folder, False

    def before(self, step: int) -> None:
        """Call it before a step is given to the devices."""
        if self._steps is not None and not self._on and self._steps.start <= step <= self._steps.stop:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def last(self, step: int) -> bool:
        """Whether the trace ends with this step, whose result must be there before `close`."""
        return self._on and self._steps is not None and step >= self._steps.stop

    def close(self) -> None:
        """Writes the trace, if one is on."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
