"""From the bytes of one message to the bytes of its reply, or to why there is none."""

import asyncio
import difflib
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from vla_jax.serve.server import codec
from vla_jax.serve.server.batcher import Batcher, Done
from vla_jax.serve.server.config import ServeConfig
from vla_jax.serve.server.errors import Failed, Refused
from vla_jax.serve.server.metrics import Metrics
from vla_jax.serve.server.request import MAX_SEED, Request, parse
from vla_jax.serve.server.spec import Spec


class Serves(Protocol):
    """What is served: `engine.Engine`, or in tests anything like it."""

    buckets: tuple[int, ...]
    spec: Spec

    def prepare(self, request: Request, seed: int) -> Any:
        """What `run` takes of one request. Raises Refused where it asks for what cannot be done."""
        ...

    def run(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Answers, or exceptions in their place."""
        ...


class Answers:
    """Decoded and checked in the event loop (microseconds), prepared in a pool of threads, computed in one more.

    Rows, refusals and failures are values all the way, see `batcher`.
    """

    def __init__(
        self, engine: Serves, batcher: Batcher, config: ServeConfig, metrics: Metrics, *, first_seed: int
    ):
        self._engine, self._batcher, self._metrics = engine, batcher, metrics
        self._deadline_ms, self._rename = config.deadline_ms, config.renames
        self._seeds = itertools.count(first_seed)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self._preparing: set[Future] = set()

    @property
    def computing(self) -> int:
        """Rows that a thread works on now, whether or not somebody still waits for them."""
        return self._batcher.computing + len(self._preparing)

    def close(self) -> None:
        """Takes no more; does not wait."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def answer(
        self, message: str | bytes, began: float, previous_ms: float | None, gone: asyncio.Future
    ) -> bytes | Refused | Failed:
        """The frame that answers a message which arrived at the loop's time `began`.

        `gone` ends when the client's connection does: its rows are dropped then.
        """
        try:
            requests, many = self._read(message)
            limit_ms = min([self._deadline_ms, *(r.deadline_ms for r in requests if r.deadline_ms)])
            with self._batcher.admit(len(requests)):
                deadline = began + limit_ms / 1e3
                rows = await self._prepare(requests, deadline, gone)
                wrong = _first(rows, (Refused, Failed))
                if wrong is not None:
                    return wrong
                found = await self._batcher.submit(rows, deadline=deadline, gone=gone)
        except Refused as refusal:
            return refusal.bare()
        wrong = _first(found, (Refused, Failed))
        if wrong is not None:
            return wrong
        done = [each for each in found if isinstance(each, Done)]
        self._metrics.rows.inc(len(rows))
        replies = [_reply(row.seed, each) for row, each in zip(rows, done)]
        return _frame({"batch": replies} if many else replies[0], done, previous_ms)

    def _read(self, message: str | bytes) -> tuple[list[Request], bool]:
        """The requests of a message, and whether it is a batch. Raises Refused."""
        if isinstance(message, str):
            raise Refused("invalid", "a text frame; requests are binary frames of msgpack")
        spec = self._engine.spec
        try:
            decoded = codec.decode(message, items=64 + spec.max_rows * (64 + 24 * len(spec.cameras)))
        except ValueError as error:
            raise Refused("invalid", str(error)) from None
        return parse(decoded, spec, self._rename)

    async def _prepare(self, requests: Sequence[Request], deadline: float, gone: asyncio.Future) -> list[Any]:
        """Rows, or Refused or Failed in their place; what is not ready at the deadline is not waited for, and not begun
        any more."""
        futures = [self._submit(request) for request in requests]
        ready = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        left = deadline - asyncio.get_running_loop().time()
        try:
            await asyncio.wait([ready, gone], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                return ready.result()
            return [Refused("deadline", "the time that the request allowed is over")]
        finally:
            ready.cancel()

    def _submit(self, request: Request) -> Future:
        future = self._pool.submit(self._row, request, next(self._seeds) % MAX_SEED)
        self._preparing.add(future)
        future.add_done_callback(self._preparing.discard)
        return future

    def _row(self, request: Request, seed: int) -> Any | Refused | Failed:
        """Prepares a request, in the pool of threads; errors are returned and not raised."""
        try:
            return self._engine.prepare(request, seed)
        except Refused as refusal:
            return refusal.bare()
        except Exception as error:
            return Failed.of(error)


def check_renames(renames: Mapping[str, str], spec: Spec) -> None:
    """Raises ValueError where a robot's key would become one that the policy does not take."""
    known = [*spec.metadata()["observation"]]
    if spec.robot is not None:
        known += [*spec.robot.instruction, *spec.robot.unused]
    for theirs, ours in renames.items():
        if ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"rename {theirs}={ours}: the policy takes no {ours}; {hint}")


def _first(values: Sequence[Any], kinds: tuple[type, ...]) -> Any:
    """The first that is of one of these types."""
    return next((value for value in values if isinstance(value, kinds)), None)


def _reply(seed: int, done: Done) -> dict[str, Any]:
    """Arrays are for actions alone: openpi's ActionChunkBroker cuts every array of a reply into steps."""
    answer = done.answer
    reply = {"actions": np.asarray(answer.actions), "seed": seed, "bucket": answer.bucket}
    return reply if answer.plan is None else {**reply, "plan": answer.plan}


def _frame(reply: dict[str, Any], done: Sequence[Done], previous_ms: float | None) -> bytes:
    infer_ms = 1e3 * max(each.infer_s for each in done)
    timing = {"infer_ms": infer_ms, "queue_ms": 1e3 * max(each.queue_s for each in done)}
    if previous_ms is not None:
        timing["prev_total_ms"] = previous_ms
    return codec.encode({**reply, "policy_timing": {"infer_ms": infer_ms}, "server_timing": timing})
