"""The end of a server: within its limit, with the right exit status, and a log that tells the truth."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.server.harness import Echo, observe, serving
from vla_jax.serve.client import Client
from vla_jax.serve.server import codec
from vla_jax.serve.server.errors import Refused

ROOT = Path(__file__).parents[3]
HANGS = """
    import sys, time, types
    from vla_jax.cli import policy_report, serve
    from tests.serve.server.harness import Echo
    from vla_jax.flow.config import SolverConfig
    from vla_jax.serve import policy
    from vla_jax.serve.server import engine

    class Hangs(Echo):
        def warm_up(self):
            return 0

        def run(self, rows):
            print("computing", file=sys.stderr, flush=True)
            time.sleep(600)

    policy.Policy.load = lambda *path, **how: types.SimpleNamespace(step=0, config_hash="")
    policy_report.solver_of = lambda *choices: SolverConfig()
    engine.Engine = lambda *policy, **how: Hangs()
    serve.main()
"""
"""launch.serve itself, around a policy whose every call hangs."""


class Process:
    """Such a server, and what it logs."""

    def __init__(self, folder: Path, *arguments: str):
        self.log = folder / f"log{'-'.join(arguments)}"
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(HANGS), "--checkpoint", "none", "--port", "0", *arguments],
                cwd=ROOT, stderr=stderr, env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def logged(self, event: str) -> dict | None:
        for line in self.log.read_text().splitlines():
            entry = json.loads(line) if line.startswith("{") else {"event": line}
            if entry["event"] == event:
                return entry
        return None

    def wait_for(self, event: str, timeout_s: float = 120.0) -> dict:
        until = time.monotonic() + timeout_s
        while (entry := self.logged(event)) is None:
            assert time.monotonic() < until and self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return entry

    def end(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Iterator[list[Process]]:
    """Both start at the same time."""
    folder = tmp_path_factory.mktemp("hangs")
    started = [Process(folder, "--drain-s", limit) for limit in ("0.3", "300")]
    yield started
    for each in started:
        each.process.kill()
        each.process.wait()


def test_a_call_that_hangs_ends_with_the_process_after_the_drain(processes):
    """Though its client was refused and has left, so that no connection is open any more."""
    process = processes[0]
    port = process.wait_for("serving")["port"]
    hang(process, port)
    process.process.send_signal(signal.SIGTERM)
    assert process.end(30) == 1
    said = process.logged("stopped")
    assert (said["drained"], said["computing"], said["level"]) == (False, 1, "warning")
    assert said["seconds"] < 0.3 + 5


def test_a_second_signal_does_not_wait(processes):
    process = processes[1]
    port = process.wait_for("serving")["port"]
    hang(process, port)
    process.process.send_signal(signal.SIGTERM)
    process.wait_for("draining")
    process.process.send_signal(signal.SIGTERM)
    assert process.end(30) == 1, "of the 300 seconds of its drain"
    assert process.logged("stopped")["drained"] is False


def hang(process: Process, port: int) -> None:
    with Client(f"ws://127.0.0.1:{port}") as client, pytest.raises(Refused, match="deadline"):
        client.infer(observe(), deadline_ms=400)
    process.wait_for("computing")


def test_drained_means_that_no_thread_computes():
    engine = Echo()
    with serving(engine, drain_s=0.2) as server:
        with server.client() as client, pytest.raises(Refused, match="deadline"):
            client.infer(observe(0, "wait"), deadline_ms=300)
        engine.running.wait(20)
        assert server.stop() is False
        engine.gate.set()


def test_a_dead_peer_does_not_delay_the_end():
    """One that never answers the closing handshake, one in the middle of its request, one that says nothing at all."""
    with serving(Echo()) as server:
        dead = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        dead[0].sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert dead[0].recv(100).startswith(b"HTTP/1.1 101")
        dead[1].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        began = time.monotonic()
        assert server.stop() is True, "they ask for nothing, so everything was answered"
        assert time.monotonic() - began < 8, "websockets waits 10 s"
        [each.close() for each in dead]


def test_stopping_twice_does_not_wait_for_the_drain():
    engine = Echo()
    with serving(engine, drain_s=300) as server:
        busy = server.raw()
        busy.send(codec.encode(observe(0, "wait")))
        engine.running.wait(20)
        server.app.stop()
        server.app.stop()
        server.thread.join(20)
        assert server.result == [False]
        engine.gate.set()
