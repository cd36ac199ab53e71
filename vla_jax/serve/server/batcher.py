"""Dynamic batching: rows of many clients that share a program become one call, in a thread of its own.

While a call runs, the next rows gather. When the thread is free, the oldest row chooses the program and all that wait
for the same one go with it, in the order in which they came, up to the largest bucket. A call that is not full waits
up to `max_wait_s` for more, but only while somebody is connected who has nothing waiting: one robot alone never waits.

A call that raises is repeated row by row, so that one row can spoil nobody else's answer.

**Memory.** A row (its images) lives as long as somebody waits for it, or as the call that computes it. Everything that
passes between tasks and threads is a value, never an exception: an exception keeps the frames that it went through,
and with them every row in their variables, until the garbage collector happens to run.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from vla_jax.serve.server.errors import Failed, Refused
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
    row: HasProgram | None
    """None once nobody waits for it any more."""
    future: "asyncio.Future[Done | Failed]"
    since: float
    deadline: float


class Batcher:
    """Use it in one event loop: `async with batcher: … await batcher.submit(rows, …)`."""

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
        self._waiting: dict[_Waiting, None] = {}
        metrics.queued.set_function(lambda: len(self._waiting))
        self._computed: list[_Waiting] = []
        self._admitted = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._task: asyncio.Task | None = None

    async def __aenter__(self) -> "Batcher":
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def computing(self) -> int:
        """Rows of the call that runs now."""
        return len(self._computed)

    @property
    def pending(self) -> int:
        """Rows that are admitted, and those of the running call that nobody waits for any more."""
        return self._admitted + sum(waiting.row is None for waiting in self._computed)

    @contextlib.contextmanager
    def admit(self, rows: int) -> Iterator[None]:
        """Keeps room for some rows until they are answered. Raises Refused where the queue is full."""
        if self.pending + rows > self._max_queue:
            raise Refused(
                "overloaded",
                f"{self.pending} requests are being served, {self._max_queue} is the limit; try later",
            )
        self._admit(rows)
        try:
            yield
        finally:
            self._admit(-rows)

    def _admit(self, rows: int) -> None:
        self._admitted += rows
        self._metrics.pending.set(self.pending)

    async def submit(
        self, rows: Sequence[HasProgram], *, deadline: float, gone: asyncio.Future | None = None
    ) -> list[Done | Failed | Refused]:
        """What becomes of each row; Refused where the loop's clock passes `deadline`, or `gone` is done, before.

        `gone` ends when the client's connection does. On return no row is held here but those of the running call.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        waiting = [_Waiting(row, loop.create_future(), now, deadline) for row in rows]
        self._waiting.update(dict.fromkeys(waiting))
        self._arrived.set()
        answered = asyncio.gather(*[each.future for each in waiting])
        try:
            ends = [answered] if gone is None else [answered, gone]
            await asyncio.wait(ends, timeout=deadline - now, return_when=asyncio.FIRST_COMPLETED)
            return [
                each.future.result() if each.future.done() else Refused("deadline", _OVER) for each in waiting
            ]
        finally:
            answered.cancel()
            for each in waiting:
                self._waiting.pop(each, None)
                each.row = None

    async def _serve(self) -> None:
        while True:
            await self._fill()
            # No variable here: it would hold the rows until the next call.
            await self._call(self._take(asyncio.get_running_loop().time()))

    async def _fill(self) -> None:
        """Returns when something waits, and enough of it or for long enough."""
        loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            if self._waiting:
                left = next(iter(self._waiting)).since + self._max_wait_s - loop.time()
                if left <= 0 or len(self._waiting) >= min(self._max_batch, self._clients()):
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), left)
            else:
                await self._arrived.wait()

    def _take(self, now: float) -> list[_Waiting]:
        """The next call's rows; one whose time is over is left out, whoever waits for it is about to notice."""
        chosen: list[_Waiting] = []
        program: Hashable = None
        for waiting in self._waiting:
            if waiting.row is None or now >= waiting.deadline:
                continue
            if not chosen:
                program = waiting.row.program
            if waiting.row.program == program:
                chosen.append(waiting)
            if len(chosen) == self._max_batch:
                break
        for waiting in chosen:
            del self._waiting[waiting]
        return chosen

    async def _call(self, batch: list[_Waiting]) -> None:
        if not batch:  # all that waited is past its deadline: let those who wait for it go first
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        started, self._computed = loop.time(), batch
        try:
            rows = [waiting.row for waiting in batch]
            answers = await loop.run_in_executor(self._thread, self._answers, rows)
        finally:
            self._computed = []
        self._metrics.pending.set(self.pending)
        infer_s = loop.time() - started
        self._metrics.batch_rows.observe(len(batch))
        self._metrics.infer_s.observe(infer_s)
        for waiting, answer in zip(batch, answers):
            self._metrics.queue_s.observe(started - waiting.since)
            if waiting.future.done():  # nobody waits any more
                continue
            done = answer if isinstance(answer, Failed) else Done(answer, started - waiting.since, infer_s)
            waiting.future.set_result(done)

    def _answers(self, rows: Sequence[Any]) -> list[Any]:
        """In the inference thread: one answer or Failed per row."""
        try:
            answers = self._run(rows)
            if len(answers) != len(rows):
                raise RuntimeError(f"{len(answers)} answers for {len(rows)} rows")
            return [Failed.of(answer) if isinstance(answer, Exception) else answer for answer in answers]
        except Exception as error:
            if len(rows) == 1:
                return [Failed.of(error)]
        self._metrics.split.inc()
        return [self._answers([row])[0] for row in rows]
