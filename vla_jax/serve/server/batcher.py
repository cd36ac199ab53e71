"""Dynamic batching: rows of many clients that share a program become one call, in a thread of its own.

While a call runs, the next rows gather. When the thread is free, the oldest row chooses the program and all that wait
for the same one go with it, in the order in which they came, up to the largest bucket. A call that is not full waits
up to `max_wait_s` for more, but only while somebody is connected who has nothing waiting: one robot alone never waits.

A call that raises is repeated row by row, so that one row can spoil nobody else's answer.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from vla_jax.serve.server.errors import Refused
from vla_jax.serve.server.metrics import Metrics

_OVER = "the time that the request allowed is over"


class HasProgram(Protocol):
    """Rows of equal `program` can share a call."""

    @property
    def program(self) -> Hashable:
        """What they must have in common."""


class Done(NamedTuple):
    """An answer and what it took."""

    answer: Any
    queue_s: float
    """From submission to the start of the call."""
    infer_s: float
    """The call, shared with the other rows in it."""


@dataclasses.dataclass(eq=False)
class _Waiting:
    row: HasProgram
    future: asyncio.Future
    since: float
    deadline: float
    alive: Callable[[], bool]


class Batcher:
    """Use it in one event loop: `async with batcher: … await batcher.submit(row, …)`."""

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        max_batch: int,
        max_wait_s: float,
        max_queue: int,
        metrics: Metrics,
        clients: Callable[[], int],
    ):
        self._run, self._metrics, self._clients = run, metrics, clients
        self._max_batch, self._max_wait_s, self._max_queue = max_batch, max_wait_s, max_queue
        self._waiting: list[_Waiting] = []
        self._admitted = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._task: asyncio.Task | None = None

    async def __aenter__(self) -> "Batcher":
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._thread.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def admit(self, rows: int) -> Iterator[None]:
        """Keeps room for some rows until they are answered. Raises Refused where the queue is full."""
        if self._admitted + rows > self._max_queue:
            raise Refused(
                "overloaded",
                f"{self._admitted} requests are being served, {self._max_queue} is the limit; try later",
            )
        self._admitted += rows
        self._metrics.pending.set(self._admitted)
        try:
            yield
        finally:
            self._admitted -= rows
            self._metrics.pending.set(self._admitted)

    async def submit(
        self, row: HasProgram, *, deadline: float, alive: Callable[[], bool] = lambda: True
    ) -> Done:
        """The answer of one row; raises what its call raised, or Refused when the loop's clock is past `deadline`.

        A row that is not `alive` when its turn comes (its client has gone) is left out.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(row, loop.create_future(), loop.time(), deadline, alive)
        self._waiting.append(waiting)
        self._arrived.set()
        try:
            async with asyncio.timeout_at(deadline):
                return await waiting.future
        except TimeoutError:
            raise Refused("deadline", _OVER) from None

    async def _serve(self) -> None:
        while True:
            await self._fill()
            batch = self._take(asyncio.get_running_loop().time())
            if batch:
                await self._call(batch)

    async def _fill(self) -> None:
        """Returns when something waits, and enough of it or for long enough."""
        loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            if self._waiting:
                left = self._waiting[0].since + self._max_wait_s - loop.time()
                if left <= 0 or len(self._waiting) >= min(self._max_batch, self._clients()):
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), left)
            else:
                await self._arrived.wait()

    def _take(self, now: float) -> list[_Waiting]:
        """The next call's rows; those whose time is over or whose client has gone are dropped."""
        chosen, left = [], []
        for waiting in self._waiting:
            if waiting.future.done():
                continue
            if now >= waiting.deadline or not waiting.alive():
                waiting.future.set_exception(Refused("deadline", _OVER))
            elif len(chosen) < self._max_batch and (
                not chosen or waiting.row.program == chosen[0].row.program
            ):
                chosen.append(waiting)
            else:
                left.append(waiting)
        self._waiting = left
        return chosen

    async def _call(self, batch: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        rows = [waiting.row for waiting in batch]
        answers = await loop.run_in_executor(self._thread, self._answers, rows)
        infer_s = loop.time() - started
        self._metrics.batch_rows.observe(len(batch))
        self._metrics.infer_s.observe(infer_s)
        for waiting, answer in zip(batch, answers):
            self._metrics.queue_s.observe(started - waiting.since)
            if waiting.future.done():  # its deadline passed while it was computed
                continue
            if isinstance(answer, Exception):
                waiting.future.set_exception(answer)
            else:
                waiting.future.set_result(Done(answer, started - waiting.since, infer_s))

    def _answers(self, rows: Sequence[Any]) -> Sequence[Any]:
        """In the inference thread: one answer or exception per row."""
        try:
            answers = self._run(rows)
            if len(answers) != len(rows):
                raise RuntimeError(f"{len(answers)} answers for {len(rows)} rows")
            return answers
        except Exception as error:
            if len(rows) == 1:
                return [error]
            self._metrics.split.inc()
            return [self._answers([row])[0] for row in rows]
