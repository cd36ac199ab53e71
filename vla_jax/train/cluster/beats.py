"""What the processes of a run tell of themselves, and what follows from it: who failed, who is gone, who is stuck."""

import dataclasses
from collections.abc import Mapping

STEP = "in the training step"
"""The phase in which a process waits for the others."""

STARTING, RESTORING, COMPILING = "starting", "restoring or initialising", "compiling"
SLOW = {STARTING, RESTORING, COMPILING}
"""Phases that may take four times as long as the others before they count as stuck."""


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a process tells of itself."""

    host: str
    number: int
    step: int
    phase: str
    seconds: float
    """In this step and phase."""
    done: bool = False

    def __str__(self) -> str:
        return f"at step {self.step}, {self.phase}"

    def is_stuck(self, after: float) -> bool:
        """Whether this has lasted too long."""
        return 0 < after < self.seconds / (4 if self.phase in SLOW else 1)


def failed(errors: Mapping[int, str], beats: Mapping[int, Beat]) -> str | None:
    """Names the first process that has told of an error."""
    if not errors:
        return None
    i = min(errors)
    host = f" ({beats[i].host})" if i in beats else ""
    return f"process {i}{host} failed: {errors[i]}"


def gone(i: int, seconds: float, beat: Beat | None) -> str:
    """Names a process that has not been heard of for so long."""
    host = f" ({beat.host})" if beat else ""
    return f"process {i}{host} is gone: silent for {seconds:.0f} s, " + (
        f"last seen {beat}" if beat else "never seen"
    )


def stuck(beats: Mapping[int, Beat], after: float) -> str | None:
    """Names the process that the others wait for: the one that is behind, or not in the step."""
    waiting = {i: beat for i, beat in beats.items() if not beat.done}
    if not any(beat.is_stuck(after) for beat in waiting.values()):
        return None
    first = min(waiting, key=lambda i: (waiting[i].step, waiting[i].phase == STEP, i))
    beat = waiting[first]
    longest = max(b.seconds for b in waiting.values())
    if all(str(b) == str(beat) for b in waiting.values()):
        return f"stuck: no progress for {longest:.0f} s; all processes are {beat}"
    return (
        f"stuck: no progress for {longest:.0f} s; process {first} ({beat.host}) is {beat} "
        f"since {beat.seconds:.0f} s, and the others wait for it"
    )
