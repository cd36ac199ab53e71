"""What is refused before a server starts, each in one line; and a server behind TLS."""

import ssl
import sys
from pathlib import Path

import pytest
from websockets.exceptions import WebSocketException

from launch import _main, replay, serve
from tests.serve.server.harness import Echo, observe, serving
from vla_jax.serve.client import Client
from vla_jax.serve.server.config import ServeConfig

TLS = Path(__file__).parent / "tls"
"""A self-signed certificate for 127.0.0.1 and its key, good for tests only and until 2126."""


def refused(monkeypatch, capsys, module, *argv: str) -> str:
    """The one line on stderr with which a launcher refuses."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *argv])
    with pytest.raises(SystemExit) as stop:
        _main.run(module.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--port 70000", "port=70000"),
        ("--max-queue 0", "max_queue=0"),
        ("--max-wait-ms -1", "max_wait_ms=-1.0 is negative"),
        ("--deadline-ms 0", "deadline_ms=0.0"),
        ("--tls-cert a.pem", "tls_cert and tls_key belong together"),
        ("--tls-cert a.pem --tls-key b.pem", "No such file"),
        ("--token short", "8 or more printable"),
        ("--token long-enough --token-file x", "token and token_file"),
        ("--token-file nowhere", "nowhere"),
        ("--rename image", "use ROBOT_KEY=OUR_KEY"),
        ("--bucket 3", "did you mean --buckets?"),
    ],
)
def test_serve_refuses_in_one_line(monkeypatch, capsys, argv, message):
    assert message in refused(monkeypatch, capsys, serve, "--checkpoint", "nowhere", *argv.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "one of --checkpoint and --url"),
        ("--checkpoint a --url ws://b", "one of --checkpoint and --url"),
        ("--url ws://b --num-steps 3", "need --checkpoint"),
        ("--checkpoint a --limit 0", "limit=0"),
        ("--checkpoint a", "nowhere"),
    ],
)
def test_replay_refuses_in_one_line(monkeypatch, capsys, argv, message):
    assert message in refused(monkeypatch, capsys, replay, "--record", "nowhere", *argv.split())


@pytest.mark.parametrize(
    ("host", "beyond"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("robot.local", True)],
)
def test_what_others_can_reach_is_known(host, beyond):
    assert ServeConfig(host=host).beyond_loopback == beyond


def test_token_from_a_file(tmp_path):
    (tmp_path / "token").write_text("correct-horse\n")
    assert ServeConfig(token_file=tmp_path / "token").secret() == "correct-horse"


def test_tls():
    trust = ssl.create_default_context(cafile=TLS / "cert.pem")
    with serving(Echo(), tls_cert=TLS / "cert.pem", tls_key=TLS / "key.pem") as server:
        with pytest.raises((OSError, WebSocketException)):
            server.client(open_timeout=5)
        with Client(server.url.replace("ws:", "wss:"), ssl=trust) as client:
            assert client.infer(observe(3))["actions"][0, 0] == 3
