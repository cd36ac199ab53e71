"""What is refused, expired, failed or answered leaves nothing behind, without the garbage collector's help."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection

from tests.serve.server.harness import SPEC, Echo, Seen, eventually, observe, serving, watching
from vla_jax.serve.server import codec
from vla_jax.serve.server.errors import Refused
from vla_jax.serve.server.logs import Logs
from vla_jax.serve.server.metrics import Metrics
from vla_jax.serve.server.recording import Recorder


@pytest.fixture
def seen(monkeypatch) -> Iterator[Seen]:
    with watching(monkeypatch) as seen:
        yield seen


class ImageRow(NamedTuple):
    program: int
    state: np.ndarray
    prompt: str
    seed: int
    image: np.ndarray


class Images(Echo):
    """Its rows hold their images, as an engine's do."""

    def prepare(self, request, seed):
        if request.prompt == "unfit":
            raise Refused("invalid", "the text does not fit")
        if request.prompt == "broken":
            raise ArithmeticError("the tokenizer has fallen over")
        return ImageRow(*super().prepare(request, seed), request.images["top"])


def test_what_has_expired_does_not_wait_for_the_next_call(seen):
    """While one call hangs, many more requests than the queue has room for come and expire."""
    engine = Images()
    with serving(engine, max_queue=4) as server, server.client() as blocker, ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(blocker.infer, observe(0, "wait"))
        engine.running.wait(20)
        outcomes = set()
        with server.client() as client:
            for _ in range(30):
                for message in (client.infer, lambda *a, **o: client.infer_batch([*a] * 4, [o] * 4)):
                    with pytest.raises(Refused) as refusal:
                        message(observe(1), deadline_ms=15)
                    outcomes.add(refusal.value.code)
            assert outcomes == {"deadline", "overloaded"}
            eventually(lambda: seen.images <= 1, 5)  # of the call itself
        assert server.app.metrics.value("vla_pending_rows") == 1
        engine.gate.set()
        blocked.result()
        eventually(lambda: seen.images == 0, 5)


@pytest.mark.parametrize("prompt", ["go", "raise", "nan", "unfit", "broken", 3])
def test_nothing_is_left_of_a_request_whatever_became_of_it(seen, prompt):
    """The connection stays open and idle, and no further call is made."""
    with serving(Images()) as server:
        for count in (1, 3):
            requests = [observe(1, "go") for _ in range(count - 1)] + [observe(1, prompt)]
            open_still = server.raw()
            open_still.send(codec.encode({"batch": requests} if count > 1 else requests[0]))
            assert isinstance(open_still.recv(), str) == (prompt != "go")
            eventually(lambda: seen.images == 0, 5)


def test_rows_of_a_client_that_has_gone_are_dropped_while_the_call_runs(seen):
    engine = Images()
    with serving(engine) as server, server.client() as blocker, ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(blocker.infer, observe(0, "wait"))
        engine.running.wait(20)
        goner = server.raw()
        goner.send(codec.encode({"batch": [observe(1)] * 3}))
        eventually(lambda: server.app.metrics.value("vla_pending_rows") == 4)
        goner.close()
        eventually(lambda: seen.images == 1 and server.app.metrics.value("vla_pending_rows") == 1, 5)
        engine.gate.set()
        blocked.result()


class Counted(bytes):
    """A message that knows how many of its kind there are."""

    alive = 0

    def __new__(cls, data):
        cls.alive += 1
        return super().__new__(cls, data)

    def __del__(self):
        type(self).alive -= 1


def test_an_idle_connection_does_not_keep_its_last_message(seen, monkeypatch, tmp_path):
    receive = ServerConnection.recv

    async def recv(self, *arguments):
        return Counted(await receive(self, *arguments))

    monkeypatch.setattr(ServerConnection, "recv", recv)
    metrics = Metrics()
    keeper = Recorder(tmp_path, SPEC.metadata(), max_bytes=10**9, metrics=metrics, logs=Logs())
    with serving(Images(), recorder=keeper) as server:
        one, other = server.raw(), server.raw()
        one.send(codec.encode(observe(1)))
        other.send(codec.encode(observe(1, 3)))
        assert isinstance(one.recv(), bytes) and other.recv().startswith("invalid")
        eventually(lambda: metrics.value("vla_recorded_total", outcome="written") == 1)
        eventually(lambda: Counted.alive == 0, 5)
    keeper.close()
