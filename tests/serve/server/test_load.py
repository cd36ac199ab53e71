"""The short forms of benchmarks/serve_load.py, in this process: many clients, and malformed messages."""

import asyncio
import os

import numpy as np
import pytest

from benchmarks import _serve_policies, serve_load
from tests.serve.server.harness import eventually, serving, watching
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.policy import Policy
from vla_jax.serve.server import codec
from vla_jax.serve.server.engine import Engine
from vla_jax.serve.server.errors import Refused
from vla_jax.serve.server.request import parse


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> serve_load.Expected:
    run = tmp_path_factory.mktemp("load") / "run"
    _serve_policies.save(run, "tabletop")
    policy = Policy.load(run)
    engine = Engine(policy, solver=SolverConfig(num_steps=2), buckets=(1, 8), plans=False)
    engine.warm_up()
    return serve_load.Expected(engine, seed=0)


def test_many_clients_none_lost_or_mixed_up_and_calls_are_shared(expected):
    with serving(expected.engine, deadline_ms=60_000) as server:
        report = asyncio.run(serve_load.load(server.port, expected, requests=400, clients=16))
    assert report["replies"] == 400
    assert report["rows_per_call"] > 2


def test_a_reply_to_somebody_else_would_be_noticed(expected):
    answer = expected.engine.run([expected.rows[1]])[0]
    reply = {"actions": answer.actions, "seed": 0, "bucket": 1}
    with pytest.raises(AssertionError, match="another one's"):
        expected.check(0, codec.encode(reply))
    expected.check(1, codec.encode(reply | {"seed": 1}))


def test_an_engine_keeps_nothing_of_what_it_answered(expected, monkeypatch):
    with serving(expected.engine, deadline_ms=60_000) as server, watching(monkeypatch) as seen:
        socket = server.raw()
        for frame in (*expected.frames, codec.encode({"batch": expected.observations[:5]})):
            socket.send(frame)
            assert isinstance(socket.recv(), bytes)
        eventually(lambda: seen.images == 0, 5)


def count(server, outcome: str) -> float:
    return server.app.metrics.value("vla_requests_total", outcome=outcome)


def test_malformed_messages_harm_nobody(expected):
    with serving(expected.engine) as server:
        report = asyncio.run(serve_load.attack(server.port, os.getpid(), expected, messages=1500, seed=3))
        assert count(server, "invalid") == report["refused"]
        eventually(lambda: count(server, "oversized") == report["closed"] > 0)
        assert count(server, "error") == 0
    assert report["messages"] == 1500 == report["refused"] + report["closed"]
    assert report["honest_replies"] >= report["closed"]


@pytest.mark.parametrize("kind", serve_load.KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_message_is_malformed(expected, kind):
    """None of them is by chance a request that the server should answer."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        message = kind(rng, dict(expected.observations[0]))
        if isinstance(message, str) or len(message) > expected.engine.spec.max_bytes:
            continue
        with pytest.raises((ValueError, Refused)):
            requests, _ = parse(codec.decode(message), expected.engine.spec, {})
            [expected.engine.prepare(request, 0) for request in requests]
