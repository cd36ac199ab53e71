"""The server: openpi's websocket protocol, its health check, metrics, and an orderly end.

A connection begins with a frame of metadata. Then, one at a time: a binary frame with an observation, answered by a
binary frame with actions, or by a text frame that says why not (`errors`). Whatever a policy does, connections are
kept, pings and `/healthz` answered.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Sequence

from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.protocol import State

from vla_jax.serve.server import codec
from vla_jax.serve.server.access import Access, peer
from vla_jax.serve.server.answers import Answers, Serves, check_renames
from vla_jax.serve.server.batcher import Batcher
from vla_jax.serve.server.config import ServeConfig
from vla_jax.serve.server.errors import Failed, Refused
from vla_jax.serve.server.listener import Door, Listener, bind
from vla_jax.serve.server.logs import Logs
from vla_jax.serve.server.metrics import Metrics
from vla_jax.serve.server.recording import Recorder

FAILED = "Internal server error. Traceback included in previous frame."
"""Reason of the close after an exception, as openpi's server says it."""
GOING = "the server is being stopped"
GOODBYE_S = 1.0
"""Seconds for the closing handshakes at the end: nobody may need more, a robot that is gone itself never answers."""
HANDSHAKE_S = 10.0
"""Longest TLS handshake, and longest wait for the request that follows."""
SEND_S = 20.0
"""Longest time for a client to take its reply."""


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
        bound: tuple[Door, Sequence[Listener]] | None = None,
    ):
        """`bound`: what `config.bind()` gave; default: the port is taken when `run` begins. Raises ValueError."""
        check_renames(config.renames, engine.spec)
        self._engine, self._config, self._recorder = engine, config, recorder
        self.metrics, self._logs = metrics or Metrics(), logs or Logs()
        self._tls, self._first_seed, self._bound = config.tls(), first_seed, bound
        self._metadata = codec.encode(engine.spec.metadata())
        self._connections: set[ServerConnection] = set()
        self._idle: set[ServerConnection] = set()
        self._connected, self._answering = 0, 0
        self._access = Access(config, self.metrics, self._logs, lambda: len(self._connections))
        self.door: Door
        self._stopping: asyncio.Event
        self._at_once: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._answers: Answers

    async def run(self, ready: Callable[[int], None] = lambda port: None) -> bool:
        """Listens until `stop`, SIGTERM or SIGINT; `ready` is told the port. Raises OSError.

        Returns whether everything that was accepted has been answered and no thread computes. Otherwise a thread may
        never end, and only `os._exit` ends the process.
        """
        self._loop = asyncio.get_running_loop()
        self._stopping, self._at_once = asyncio.Event(), asyncio.Event()
        self.door, listeners = self._bound or bind(
            self._config.host, self._config.port, self._config.max_connections
        )
        batcher = Batcher(
            self._engine.run,
            max_batch=max(self._engine.buckets),
            max_wait_s=self._config.max_wait_ms / 1e3,
            max_queue=self._config.max_queue,
            metrics=self.metrics,
            clients=lambda: len(self._connections),
        )
        self._answers = Answers(
            self._engine, batcher, self._config, self.metrics, first_seed=self._first_seed
        )
        with self._signals():
            async with batcher:
                servers = [await self._listen(listener) for listener in listeners]
                port = listeners[0].getsockname()[1]
                self._logs.info("serving", host=self._config.host, port=port, tls=self._tls is not None)
                ready(port)
                await self._stopping.wait()
                drained = await self._drain(servers)
                self._answers.close()
        return drained

    def stop(self) -> None:
        """Ends `run` in an orderly way: nothing new is taken, what was taken is answered. Any thread may call it.

        Called a second time, it ends `run` at once.
        """
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        (self._at_once if self._stopping.is_set() else self._stopping).set()

    async def _listen(self, listener: Listener) -> WebsocketServer:
        return await serve(
            self._connection,
            sock=listener,
            ssl=self._tls,
            process_request=self._access.answer,
            create_connection=_explaining(self._engine.spec.max_bytes),
            open_timeout=HANDSHAKE_S,
            origins=[None],  # web pages have an origin, robots have not
            compression=None,
            max_size=self._engine.spec.max_bytes,
            max_queue=1,
            logger=_silent(),
        )

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and SIGINT stop the server; outside the main thread signals are somebody else's."""
        loop, ours = asyncio.get_running_loop(), []
        for number in (signal.SIGTERM, signal.SIGINT):
            # The first two mean another thread, the last an event loop without signals (Windows): `stop` still works.
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                loop.add_signal_handler(number, self._stop)
                ours.append(number)
        try:
            yield
        finally:
            for number in ours:
                loop.remove_signal_handler(number)

    async def _drain(self, servers: Sequence[WebsocketServer]) -> bool:
        """Waits for what was accepted, at most `drain_s`; then ends every connection, whatever its peer does."""
        began = self._loop.time()
        self._logs.info("draining", connections=len(self._connections), limit_s=self._config.drain_s)
        for server in servers:
            server.close(close_connections=False)
        goodbyes = {asyncio.create_task(_goodbye(ws)) for ws in tuple(self._idle)}
        while (self._answering or self._answers.computing) and not self._at_once.is_set():
            if self._loop.time() - began >= self._config.drain_s:
                break
            await asyncio.sleep(0.02)
        unanswered, computing = self._answering, self._answers.computing
        drained = not unanswered and not computing
        if not self._at_once.is_set():
            goodbyes |= {asyncio.create_task(_goodbye(ws)) for ws in tuple(self._connections)}
            if goodbyes:
                await asyncio.wait(goodbyes, timeout=GOODBYE_S)
        for ws in tuple(self._connections):
            _abort(ws)
        self.door.close()
        await asyncio.wait(
            [asyncio.create_task(server.wait_closed()) for server in servers], timeout=GOODBYE_S
        )
        say = self._logs.info if drained else self._logs.warning
        say(
            "stopped",
            drained=drained,
            unanswered=unanswered,
            computing=computing,
            seconds=round(self._loop.time() - began, 3),
        )
        return drained

    async def _connection(self, ws: ServerConnection) -> None:
        self.door.known(ws.transport.get_extra_info("socket").fileno())
        self._connected += 1
        number = self._connected
        self._connections.add(ws)
        self.metrics.connections.set(len(self._connections))
        self._logs.info("connected", connection=number, peer=peer(ws))
        gone = asyncio.ensure_future(ws.wait_closed())
        try:
            await self._converse(ws, number, gone)
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
            gone.cancel()
            self._idle.discard(ws)
            self._connections.discard(ws)
            self.metrics.connections.set(len(self._connections))
            self._logs.info("disconnected", connection=number)

    async def _converse(self, ws: ServerConnection, number: int, gone: asyncio.Future) -> None:
        """Messages in, replies out, until one side has had enough."""
        await _send(ws, self._metadata)
        previous_ms = None
        while not self._stopping.is_set():
            previous_ms = await self._exchange(ws, number, previous_ms, gone)
            if previous_ms is None:
                return
        await ws.close(1001, GOING)

    async def _exchange(
        self, ws: ServerConnection, number: int, previous_ms: float | None, gone: asyncio.Future
    ) -> float | None:
        """One message and its reply; returns how long it took, None where the connection ends.

        A function of its own, so that no variable holds the last message while the next one is waited for.
        """
        self._idle.add(ws)
        message = await ws.recv()
        self._idle.discard(ws)
        began = self._loop.time()
        self._answering += 1
        try:
            if self._stopping.is_set():
                reply = Refused("draining", f"{GOING}; connect to another one")
            else:
                reply = await self._answers.answer(message, began, previous_ms, gone)
            if gone.done():
                self.metrics.requests.labels("gone").inc()
                return None
            if isinstance(reply, Failed):
                self.metrics.requests.labels("error").inc()
                self._logs.error("failed", reply.trace, connection=number)
                await _send(ws, reply.said)
                await ws.close(1011, FAILED)
                return None
            if isinstance(reply, Refused):
                outcome, frame = reply.code, str(reply)
                self._logs.warning("refused", connection=number, code=reply.code, why=reply.message)
            else:
                outcome, frame = "ok", reply
                if self._recorder is not None and isinstance(message, bytes):
                    self._recorder.add(message, reply)
            self.metrics.requests.labels(outcome).inc()
            await _send(ws, frame)
        finally:
            self._answering -= 1
        took = self._loop.time() - began
        self.metrics.request_s.observe(took)
        return 1e3 * took


async def _send(ws: ServerConnection, frame: bytes | str) -> None:
    """Sends; a client that does not read loses its connection. Raises ConnectionClosed."""
    try:
        async with asyncio.timeout(SEND_S):
            await ws.send(frame)
    except TimeoutError:
        _abort(ws)
        await ws.wait_closed()


async def _goodbye(ws: ServerConnection) -> None:
    """The closing handshake."""
    # asyncio's transport cannot be aborted, as websockets does in the end, once it has closed with bytes to write.
    with contextlib.suppress(AttributeError):
        await ws.close(1001, GOING)


def _abort(ws: ServerConnection) -> None:
    """Ends a connection without a handshake, unless it has ended."""
    if ws.state is not State.CLOSED:
        ws.transport.abort()


def _explaining(max_bytes: int) -> type[ServerConnection]:
    """Connections that say with a close for size (1009) what is too large and where the limit stands."""

    class Connection(ServerConnection):
        def __init__(self, protocol, *arguments, **options):
            super().__init__(protocol, *arguments, **options)
            fail = protocol.fail

            def explain(code: int, reason: str = "") -> None:
                if code == 1009:  # at most 123 bytes
                    reason = f"the message is over {max_bytes} bytes: check image size and rows (metadata: max_bytes)"
                fail(code, reason)

            protocol.fail = explain

    return Connection


def _silent() -> logging.Logger:
    """websockets writes a traceback for every broken handshake; `/metrics` and our own log are enough."""
    logger = logging.getLogger("vla_jax.serve.websockets")
    logger.setLevel(logging.CRITICAL)
    return logger
