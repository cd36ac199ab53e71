"""A server in a thread of the test's process, around a real policy or around a stand-in that misbehaves on demand."""

import asyncio
import contextlib
import dataclasses
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from websockets.sync.client import connect

from vla_jax.serve.client import Client
from vla_jax.serve.server import codec
from vla_jax.serve.server.app import App
from vla_jax.serve.server.config import ServeConfig
from vla_jax.serve.server.engine import Answer
from vla_jax.serve.server.request import Request
from vla_jax.serve.server.spec import Spec

SPEC = Spec(
    cameras={"top": (4, 4)},
    state_names=("x", "y"),
    action_names=("a", "b"),
    horizon=3,
    control_hz=10.0,
    samples=(1, 2),
    max_rows=4,
)


class EchoRow(NamedTuple):
    program: int
    state: np.ndarray
    prompt: str
    seed: int


@dataclasses.dataclass
class Echo:
    """Actions are the state + step number. A prompt tells it to sleep, to wait for `gate`, or to raise."""

    spec: Spec = SPEC
    buckets: tuple[int, ...] = (1, 4)
    calls: list[int] = dataclasses.field(default_factory=list)
    gate: threading.Event = dataclasses.field(default_factory=threading.Event)
    running: threading.Event = dataclasses.field(default_factory=threading.Event)

    def prepare(self, request: Request, seed: int) -> EchoRow:
        seed = seed if request.seed is None else request.seed
        return EchoRow(request.samples, request.state, request.prompt, seed)

    def run(self, rows: Sequence[EchoRow]) -> list[Answer | Exception]:
        self.calls.append(len(rows))
        self.running.set()
        prompts = [row.prompt for row in rows]
        if "raise" in prompts:
            raise ArithmeticError("the arm has fallen off")
        if "wait" in prompts and not self.gate.wait(30):
            raise AssertionError("nobody opened the gate")
        bucket = next(size for size in self.buckets if size >= len(rows))
        return [
            FloatingPointError("not finite")
            if row.prompt == "nan"
            else Answer((row.state + np.arange(3)[:, None]).astype(np.float32), None, bucket)
            for row in rows
        ]


class Running(NamedTuple):
    app: App
    port: int
    result: list
    thread: threading.Thread
    sockets: contextlib.ExitStack

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def client(self, **how: Any) -> Client:
        return Client(self.url, **how)

    def raw(self, **how: Any):
        """A bare websocket that has read the metadata; it is closed with the server."""
        socket = self.sockets.enter_context(connect(self.url, compression=None, max_size=None, **how))
        socket.recv()
        return socket

    def ask(self, message: Any) -> Any:
        """The decoded reply to a message, or the text, without what our client checks before it sends."""
        with connect(self.url, compression=None, max_size=None) as socket:
            socket.recv()
            socket.send(message if isinstance(message, bytes | str) else codec.encode(message))
            frame = socket.recv()
        return frame if isinstance(frame, str) else codec.decode(frame)

    def stop(self) -> bool:
        """Drains; returns whether everything was answered."""
        if self.thread.is_alive():
            self.app.stop()
            self.thread.join(30)
        return self.result[0]


@contextlib.contextmanager
def serving(
    engine: Any, *, recorder: Any = None, metrics: Any = None, bound: Any = None, **config: Any
) -> Iterator[Running]:
    """Listens on a free port while the block runs."""
    app = App(engine, ServeConfig(port=0, **config), recorder=recorder, metrics=metrics, bound=bound)
    ready, port, result = threading.Event(), [], []

    def run() -> None:
        result.append(asyncio.run(app.run(lambda number: (port.append(number), ready.set()))))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    with contextlib.ExitStack() as sockets:
        running = Running(app, port[0], result, thread, sockets)
        sockets.callback(running.stop)
        yield running


class Seen:
    """Weak references to every array that a message was decoded to."""

    def __init__(self):
        self._arrays: list[weakref.ref] = []

    def add(self, value) -> None:
        if isinstance(value, np.ndarray):
            self._arrays.append(weakref.ref(value))
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            self.add(inner)

    @property
    def images(self) -> int:
        """Those that are still in memory."""
        return sum(getattr(array(), "ndim", 0) == 3 for array in self._arrays)


@contextlib.contextmanager
def watching(monkeypatch: Any) -> Iterator[Seen]:
    """Sees what is decoded. Without the garbage collector, which would hide reference cycles by chance."""
    seen, decode = Seen(), codec.decode

    def spy(data: bytes, **limits: Any) -> Any:
        message = decode(data, **limits)
        seen.add(message)
        return message

    monkeypatch.setattr(codec, "decode", spy)
    gc.collect()
    gc.disable()
    try:
        yield seen
    finally:
        gc.enable()


def observe(x: float = 0.0, prompt: str = "go") -> dict[str, Any]:
    """What a robot of `SPEC` sends."""
    return {
        "observation/top": np.zeros((4, 4, 3), np.uint8),
        "observation/state": np.array([x, -x], np.float32),
        "prompt": prompt,
    }


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Fails unless the condition comes true."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
