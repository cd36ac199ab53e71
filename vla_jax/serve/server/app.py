"""The server: openpi's websocket protocol, its health check, metrics, and an orderly end.

A connection begins with a frame of metadata. Then, one at a time: a binary frame with an observation, answered by a
binary frame with actions, or by a text frame that says why not (`errors`). Bytes are decoded and checked in the event
loop (microseconds), preprocessed in a pool of threads, computed in one more: whatever a policy does, connections are
kept, pings and `/healthz` answered.
"""

import asyncio
import contextlib
import hmac
import http
import itertools
import logging
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.protocol import State

from vla_jax.serve.server import codec
from vla_jax.serve.server.batcher import Batcher, Done
from vla_jax.serve.server.config import ServeConfig
from vla_jax.serve.server.errors import Refused
from vla_jax.serve.server.logs import Logs
from vla_jax.serve.server.metrics import CONTENT_TYPE, Metrics
from vla_jax.serve.server.recording import Recorder
from vla_jax.serve.server.request import MAX_SEED, Request, parse
from vla_jax.serve.server.spec import Spec

FAILED = "Internal server error. Traceback included in previous frame."
"""Reason of the close after an exception, as openpi's server says it."""
GOING = "the server is being stopped"
GOODBYE_S = 1.0
"""Seconds for the goodbye to those whose reply does not come."""


class Serves(Protocol):
    """What is served: `engine.Engine`, or in tests anything like it."""

    buckets: tuple[int, ...]
    spec: Spec

    def prepare(self, request: Request, seed: int) -> Any:
        """A row; raises Refused."""

    def run(self, rows: list[Any]) -> list[Any]:
        """Answers, or exceptions in their place."""


class App:
    """One listening server. `await app.run(ready)` returns when it was stopped and everything is answered."""

    def __init__(
        self,
        engine: Serves,
        config: ServeConfig,
        *,
        metrics: Metrics | None = None,
        logs: Logs | None = None,
        recorder: Recorder | None = None,
        first_seed: int = 0,
    ):
        self._engine, self._config, self._recorder = engine, config, recorder
        self.metrics, self._logs = metrics or Metrics(), logs or Logs()
        self._token, self._tls = config.secret(), config.tls()
        self._rename = config.renames
        self._metadata = codec.encode(engine.spec.metadata())
        self._seeds = itertools.count(first_seed)
        self._numbers = itertools.count(1)
        self._connections: set[ServerConnection] = set()
        self._idle: set[ServerConnection] = set()
        self._stopping: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self._batcher: Batcher

    async def run(self, ready: Callable[[int], None] = lambda port: None) -> bool:
        """Listens until `stop`, SIGTERM or SIGINT; `ready` is told the port.

        Returns whether everything that was accepted has been answered. Where not, a thread may still be computing.
        """
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._batcher = Batcher(
            self._engine.run,
            max_batch=max(self._engine.buckets),
            max_wait_s=self._config.max_wait_ms / 1e3,
            max_queue=self._config.max_queue,
            metrics=self.metrics,
            clients=lambda: len(self._connections),
        )
        with self._signals():
            async with self._batcher:
                server = await serve(
                    self._connection,
                    self._config.host,
                    self._config.port,
                    ssl=self._tls,
                    process_request=self._http,
                    origins=[None],  # web pages have an origin, robots have not
                    compression=None,
                    max_size=self._engine.spec.max_bytes,
                    max_queue=1,
                    logger=_silent(),
                )
                port = server.sockets[0].getsockname()[1]
                self._logs.info("serving", host=self._config.host, port=port, tls=self._tls is not None)
                ready(port)
                await self._stopping.wait()
                drained = await self._drain(server)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._logs.info("stopped", drained=drained)
        return drained

    def stop(self) -> None:
        """Ends `run` in an orderly way: nothing new is taken, what was taken is answered. Any thread may call it."""
        self._loop.call_soon_threadsafe(self._stopping.set)

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and SIGINT stop the server; outside the main thread signals are somebody else's."""
        loop, ours = asyncio.get_running_loop(), []
        for number in (signal.SIGTERM, signal.SIGINT):
            # The first two mean another thread, the last an event loop without signals (Windows): `stop` still works.
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                loop.add_signal_handler(number, self.stop)
                ours.append(number)
        try:
            yield
        finally:
            for number in ours:
                loop.remove_signal_handler(number)

    async def _drain(self, server: WebsocketServer) -> bool:
        self._logs.info("draining", connections=len(self._connections), limit_s=self._config.drain_s)
        server.close(close_connections=False)
        await asyncio.gather(*[ws.close(1001, GOING) for ws in tuple(self._idle)])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_s):
                while self._connections:
                    await asyncio.sleep(0.02)
        drained = not self._connections
        if drained:
            await server.wait_closed()
        else:  # their replies do not come any more; the goodbye must not wait for robots that are gone themselves
            leaving = [asyncio.create_task(ws.close(1001, GOING)) for ws in tuple(self._connections)]
            await asyncio.wait(leaving, timeout=GOODBYE_S)
        return drained

    def _http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answers plain HTTP, and decides who may connect; None lets the websocket begin."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path not in ("/", "/metrics"):
            return connection.respond(http.HTTPStatus.NOT_FOUND, "there are /, /healthz and /metrics\n")
        if not self._authorised(request):
            self._logs.warning("unauthorised", peer=_peer(connection), path=path)
            return connection.respond(
                http.HTTPStatus.UNAUTHORIZED, "the header Authorization: Api-Key TOKEN is missing or wrong\n"
            )
        if path == "/metrics":
            headers = Headers({"Content-Type": CONTENT_TYPE, "Connection": "close"})
            body = self.metrics.text()
            headers["Content-Length"] = str(len(body))
            return Response(200, "OK", headers, body)
        if len(self._connections) >= self._config.max_connections:
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE,
                f"overloaded: {len(self._connections)} clients are connected\n",
            )
        return None

    def _authorised(self, request: HttpRequest) -> bool:
        if self._token is None:
            return True
        sent = request.headers.get_all("Authorization")
        wanted = f"Api-Key {self._token}".encode()
        return len(sent) == 1 and hmac.compare_digest(sent[0].encode("utf-8", "replace"), wanted)

    async def _connection(self, ws: ServerConnection) -> None:
        number = next(self._numbers)
        self._connections.add(ws)
        self.metrics.connections.set(len(self._connections))
        self._logs.info("connected", connection=number, peer=_peer(ws))
        try:
            await self._converse(ws, number)
        except ConnectionClosed as closed:
            if (
                isinstance(closed, ConnectionClosedError)
                and closed.sent is not None
                and closed.sent.code == 1009
            ):
                self.metrics.requests.labels("oversized").inc()
                self._logs.warning(
                    "oversized message", connection=number, limit_bytes=self._engine.spec.max_bytes
                )
        finally:
            self._idle.discard(ws)
            self._connections.discard(ws)
            self.metrics.connections.set(len(self._connections))
            self._logs.info("disconnected", connection=number)

    async def _converse(self, ws: ServerConnection, number: int) -> None:
        """Messages in, replies out, until one side has had enough."""
        loop = asyncio.get_running_loop()
        await ws.send(self._metadata)
        previous_ms = None
        while not self._stopping.is_set():
            self._idle.add(ws)
            message = await ws.recv()
            self._idle.discard(ws)
            began = loop.time()
            try:
                reply = await self._reply(message, began, previous_ms, lambda: ws.state is State.OPEN)
                outcome = "ok"
                if self._recorder is not None:
                    self._recorder.add(message, reply)
            except Refused as refusal:
                reply, outcome = str(refusal), refusal.code
                self._logs.warning("refused", connection=number, code=refusal.code, why=refusal.message)
            except Exception as error:
                self.metrics.requests.labels("error").inc()
                self._logs.error("failed", error, connection=number)
                await ws.send("".join(traceback.format_exception(error)))
                await ws.close(1011, FAILED)
                return
            self.metrics.requests.labels(outcome).inc()
            await ws.send(reply)
            took = loop.time() - began
            self.metrics.request_s.observe(took)
            previous_ms = 1e3 * took
        await ws.close(1001, GOING)

    async def _reply(
        self, message: str | bytes, began: float, previous_ms: float | None, alive: Callable[[], bool]
    ) -> bytes:
        """The frame that answers a message; raises Refused, or what the policy raised."""
        if self._stopping.is_set():
            raise Refused("draining", f"{GOING}; connect to another one")
        if isinstance(message, str):
            raise Refused("invalid", "a text frame; requests are binary frames of msgpack")
        spec = self._engine.spec
        try:
            decoded = codec.decode(message, items=64 + spec.max_rows * (64 + 24 * len(spec.cameras)))
        except ValueError as error:
            raise Refused("invalid", str(error)) from None
        requests, many = parse(decoded, spec, self._rename)
        limit_ms = min([self._config.deadline_ms, *(r.deadline_ms for r in requests if r.deadline_ms)])
        with self._batcher.admit(len(requests)):
            loop = asyncio.get_running_loop()
            rows = [
                await loop.run_in_executor(self._pool, self._engine.prepare, request, self._next_seed())
                for request in requests
            ]
            done = await asyncio.gather(
                *[self._batcher.submit(row, deadline=began + limit_ms / 1e3, alive=alive) for row in rows],
                return_exceptions=True,
            )
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome
        self.metrics.rows.inc(len(rows))
        replies = [_reply(row.seed, outcome) for row, outcome in zip(rows, done)]
        reply = {"batch": replies} if many else replies[0]
        infer_ms = 1e3 * max(outcome.infer_s for outcome in done)
        timing = {"infer_ms": infer_ms, "queue_ms": 1e3 * max(outcome.queue_s for outcome in done)}
        if previous_ms is not None:
            timing["prev_total_ms"] = previous_ms
        return codec.encode({**reply, "policy_timing": {"infer_ms": infer_ms}, "server_timing": timing})

    def _next_seed(self) -> int:
        return next(self._seeds) % MAX_SEED


def _reply(seed: int, done: Done) -> dict[str, Any]:
    """Arrays are for actions alone: openpi's ActionChunkBroker cuts every array of a reply into steps."""
    answer = done.answer
    reply = {"actions": np.asarray(answer.actions), "seed": seed, "bucket": answer.bucket}
    return reply if answer.plan is None else {**reply, "plan": answer.plan}


def _peer(connection: ServerConnection) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)


def _silent() -> logging.Logger:
    """websockets writes a traceback for every broken handshake; `/metrics` and our own log are enough."""
    logger = logging.getLogger("vla_jax.serve.websockets")
    logger.setLevel(logging.CRITICAL)
    return logger
