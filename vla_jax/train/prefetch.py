"""Copies the next batches to the devices while the current step runs."""

import queue
import threading
from collections.abc import Iterator

import jax
from jax.sharding import NamedSharding

from vla_jax.types import Batch, PyTree


def to_device(batch: Batch, sharding: NamedSharding) -> Batch:
    """Makes global arrays of the rows that this process has, in the order of `sharding.local_rows`."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


class Prefetch:
    """An iterator over device batches that stays `depth` ahead in a thread of its own.

    An exception in the loader is raised by `next`. Call `close` when done; it is also a context manager.
    """

    def __init__(self, batches: Iterator[PyTree], sharding: NamedSharding, depth: int = 2):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(batches, sharding), daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> PyTree:
        batch, error = self._queue.get()
        if error is not None:
            raise error
        return batch

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread after the batch it is at."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self, batches: Iterator[PyTree], sharding: NamedSharding) -> None:
        try:
            for batch in batches:
                if not self._put((to_device(batch, sharding), None)):
                    return
            self._put((None, StopIteration()))
        except Exception as error:
            self._put((None, error))

    def _put(self, entry: tuple) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
