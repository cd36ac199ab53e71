"""Stopping politely: the first SIGTERM or Ctrl-C asks, the second one insists.

With several processes a signal may reach one of them only, at any moment, yet all must stop after the same step. So
every step they vote: a maximum over all devices of 0 or 1, which all read at the same place of the loop.
"""

import os
import signal
import threading
import time
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from vla_jax.sharding import replicated


class StopSignal:
    """Inside the context, SIGTERM and SIGINT set `requested` instead of ending the process.

    The loop looks at it before its first step and between steps, saves and returns. A second signal raises
    KeyboardInterrupt at once.
    """

    def __init__(self):
        self.requested = False
        self.since: float | None = None
        """When it was, by `time.monotonic`."""
        self._previous = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # signals belong to the main thread
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.since = True, time.monotonic()
        # Not print: the signal may have interrupted one.
        os.write(2, b"stopping once the state can be saved; a second signal stops at once\n")


class Vote:
    """Whether any process of the mesh wants to stop. All must cast a vote at the same step."""

    def __init__(self, mesh: Mesh):
        self._everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._devices = len(self._everywhere.addressable_devices)
        self._alone = self._devices == mesh.size
        self._any = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def cast(self, stop: bool) -> Int[Array, ""] | bool:
        """The result, true if any process said true; reading it waits for all of them."""
        if self._alone:
            return stop
        mine = np.full(self._devices, stop, np.int32)
        return self._any(jax.make_array_from_process_local_data(self._everywhere, mine))
