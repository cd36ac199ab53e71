"""What is refused before a server starts, each in one line; and a server behind TLS."""

import socket
import ssl
import sys
from pathlib import Path

import pytest
from websockets.exceptions import WebSocketException

from tests.serve.server.harness import Echo, observe, serving
from vla_jax.cli import command, replay, serve
from vla_jax.serve.client import Client
from vla_jax.serve.server.app import App
from vla_jax.serve.server.config import ServeConfig

TLS = Path(__file__).parent / "tls"
"""A self-signed certificate for 127.0.0.1 and its key, good for tests only and until 2126."""


def refused(monkeypatch, capsys, module, *argv: str) -> str:
    """The one line on stderr with which a launcher refuses."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *argv])
    with pytest.raises(SystemExit) as stop:
        command.run(module.main)
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
        ("--drain-s nan", "drain_s=nan: must be a finite number"),
        ("--deadline-ms inf", "deadline_ms=inf: must be a finite number"),
        ("--record-gb nan", "record_gb=nan"),
        ("--host 203.0.113.7", "cannot listen on 203.0.113.7 port 8000"),
        ("--host a..b", "host 'a..b' cannot be looked up"),
        ("--rename a=observation/x a=prompt", "a robot's key is given twice"),
        ("--token short", "8 or more printable"),
        ("--token long-enough --token-file x", "token and token_file"),
        ("--token-file nowhere", "nowhere"),
        ("--rename image", "use ROBOT_KEY=OUR_KEY"),
        ("--bucket 3", "did you mean --buckets?"),
    ],
)
def test_serve_refuses_in_one_line(monkeypatch, capsys, argv, message):
    argv = ["--checkpoint", "nowhere", *argv.split()]
    assert message in refused(monkeypatch, capsys, serve, *argv)


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


def test_a_port_in_use_is_found_before_anything_is_loaded(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refused(monkeypatch, capsys, serve, "--checkpoint", "nowhere", "--port", str(port))
    assert f"cannot listen on 127.0.0.1 port {port}: address already in use; stop what listens there" in said


def test_a_port_is_taken_but_not_open_before_there_is_somebody_to_answer():
    config = ServeConfig(port=0)
    _, (listener,) = bound = config.bind()
    port = listener.getsockname()[1]
    with pytest.raises(
        ConnectionRefusedError
    ):  # so that clients wait, as for a server that is still starting
        socket.create_connection(("127.0.0.1", port))
    with serving(Echo(), bound=bound) as server, server.client() as client:
        assert server.port == port and client.infer(observe(1))["actions"][0, 0] == 1


@pytest.mark.parametrize(
    ("cert", "key", "message"),
    [
        ("nowhere.pem", "key.pem", "tls_cert nowhere.pem cannot be read: No such file"),
        ("cert.pem", "nowhere.pem", "tls_key nowhere.pem cannot be read: No such file"),
        ("garbage.pem", "key.pem", "tls_cert garbage.pem holds no certificate"),
        ("key.pem", "key.pem", "tls_cert key.pem holds no certificate"),
        ("cert.pem", "garbage.pem", "tls_key garbage.pem holds no private key"),
        ("cert.pem", "cert.pem", "tls_key cert.pem holds no private key"),
        ("cert.pem", "encrypted.pem", "tls_key encrypted.pem is encrypted"),
        ("cert.pem", "another.pem", "tls_key another.pem does not belong to tls_cert cert.pem"),
        ("cert.pem", ".", "tls_key . cannot be read: Is a directory"),
    ],
)
def test_tls_files_that_are_not_right_are_named(monkeypatch, capsys, tmp_path, cert, key, message):
    for path in TLS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "garbage.pem").write_bytes(bytes(100))
    monkeypatch.chdir(tmp_path)
    argv = ["--checkpoint", "none", "--port", "0", "--tls-cert", cert, "--tls-key", key]
    assert message in refused(monkeypatch, capsys, serve, *argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"short", "the token in token must be 8 or more"), (b"\xff" * 9, "token_file token is not ASCII text")],
)
def test_a_token_file_that_is_not_right_is_named(monkeypatch, capsys, tmp_path, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").write_bytes(content)
    assert message in refused(monkeypatch, capsys, serve, "--checkpoint", "none", "--token-file", "token")


def test_a_rename_to_what_the_policy_does_not_take_is_refused_at_the_start():
    with pytest.raises(ValueError, match="the policy takes no observation/tpo; did you mean observation/top"):
        App(Echo(), ServeConfig(rename=("cam=observation/tpo",)))


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
