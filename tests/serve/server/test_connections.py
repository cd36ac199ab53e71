"""Limits on connections hold before anybody has said who he is."""

import contextlib
import select
import socket
import ssl

import pytest

from tests.serve.server.harness import Echo, eventually, observe, serving
from tests.serve.server.test_settings import TLS
from vla_jax.serve.client import Client
from vla_jax.serve.server import app


def closed_by_the_server(sockets: list[socket.socket]) -> list[socket.socket]:
    """Those on which the end can be read."""
    ready, _, _ = select.select(sockets, [], [], 0)
    found = []
    for each in ready:
        with contextlib.suppress(ConnectionResetError):
            if each.recv(1, socket.MSG_PEEK):
                continue
        found.append(each)
    return found


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("says", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\x16\x03\x01"])
def test_silent_connections_are_bounded_and_an_honest_client_gets_in(tls, says):
    config = {"tls_cert": TLS / "cert.pem", "tls_key": TLS / "key.pem"} if tls else {}
    how = {"ssl": ssl.create_default_context(cafile=TLS / "cert.pem")} if tls else {}
    with (
        serving(Echo(), max_connections=8, token="correct-horse", **config) as server,
        contextlib.ExitStack() as stack,
    ):
        silent = []

        def open_more(count: int) -> None:
            for _ in range(count):
                silent.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port))))
                with contextlib.suppress(OSError):
                    silent[-1].sendall(says)

        url = server.url.replace("ws:", "wss:") if tls else server.url
        open_more(30)
        with Client(url, token="correct-horse", open_timeout=10, **how) as client:
            open_more(30)  # somebody who is known is never put out to make room
            eventually(lambda: len(closed_by_the_server(silent)) >= 60 - 8)
            assert client.infer(observe(3))["actions"][0, 0] == 3
            eventually(lambda: server.app.door.open <= 8 + 1)


def test_addresses_that_crowd_make_room_first():
    """A slow client of another address keeps its place."""
    with serving(Echo(), host="0.0.0.0", max_connections=3) as server, contextlib.ExitStack() as stack:

        def connect(source: str) -> socket.socket:
            return stack.enter_context(
                socket.create_connection(("127.0.0.1", server.port), source_address=(source, 0))
            )

        slow = connect("127.0.0.2")
        crowd = [connect("127.0.0.1") for _ in range(20)]
        eventually(lambda: len(closed_by_the_server(crowd)) == 18)
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert slow.recv(100).startswith(b"HTTP/1.1 200")


def test_nobody_may_take_for_ever_to_say_who_he_is(monkeypatch):
    monkeypatch.setattr(app, "HANDSHAKE_S", 0.3)
    with serving(Echo()) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        silent[1].sendall(b"GET / HTTP/1.1\r\n")
        eventually(lambda: len(closed_by_the_server(silent)) == 2)
        [each.close() for each in silent]
