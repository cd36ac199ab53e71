"""Programs that must not overlap on a CPU."""

from typing import TypeVar

import jax

T = TypeVar("T")


def settled(results: T) -> T:
    """The results of a program, awaited on a CPU; elsewhere a device runs one program after another by itself.

    A CPU's collectives hold a thread each until all devices, of all processes, have come to them. Where two programs
    are under way, one process may have its threads in the first and another in the second, and both wait for ever.
    """
    return jax.block_until_ready(results) if jax.default_backend() == "cpu" else results
