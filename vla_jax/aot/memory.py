"""What a compiled program needs of a chip's memory, and what to say where it is too much."""

import dataclasses
from typing import Any

from vla_jax.aot.hlo import UnreadableText


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes per chip."""

    arguments: int
    """State (or parameters) and batch."""
    temporaries: int
    """Activations, gathered parameters, gradients; results that are not written over an argument."""
    code: int
    limit: int
    """Of the chip, as the compiler counts it."""
    host: int = 0
    """In the host's memory, per chip."""

    @property
    def total(self) -> int:
        """All that is needed at once."""
        return self.arguments + self.temporaries + self.code

    @property
    def headroom(self) -> int:
        """What is left."""
        return self.limit - self.total


class DoesNotFit(ValueError):
    """The program needs more memory than a chip has."""

    def __init__(self, message: str, over: float):
        super().__init__(message)
        self.over = over


def memory(compiled: Any, limit: float) -> Memory:
    """Reads a `jax.stages.Compiled`."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise UnreadableText("the compiler does not say how much memory it needs")
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes + results,
        code=stats.generated_code_size_in_bytes,
        limit=int(limit),
        host=stats.host_temp_size_in_bytes + stats.host_argument_size_in_bytes,
    )
