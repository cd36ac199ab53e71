"""Listening sockets, and how many connections may be open before anybody has said who he is.

A connection is *unknown* from the TCP handshake until its websocket request, with the token, was accepted. Opening one
costs an attacker nothing, so their number is bounded here, at the sockets: below TLS, HTTP and the token. When one too
many arrives, the oldest of the address that has the most of them is closed. So an honest client, who is known within
milliseconds, gets in however many silent connections there are.
"""

import contextlib
import errno
import os
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any


class Door:
    """The accepted connections of all listening sockets of one server."""

    def __init__(self, max_unknown: int):
        self._max_unknown = max_unknown
        self._open: set[_Accepted] = set()
        self._unknown: dict[_Accepted, str] = {}
        self.evicted = 0
        """Unknown connections that had to make room."""

    @property
    def open(self) -> int:
        """TCP connections, known or not."""
        return len(self._open)

    def known(self, fileno: int) -> None:
        """The connection with this file descriptor has been let in."""
        for accepted in self._unknown:
            if accepted.fileno() == fileno:
                del self._unknown[accepted]
                return

    def close(self) -> None:
        """Ends every connection at once; whoever owns a socket reads its end and closes it."""
        for accepted in tuple(self._open):
            accepted.end()

    def _enter(self, accepted: "_Accepted", host: str) -> None:
        if len(self._unknown) >= self._max_unknown:
            ((crowd, _),) = Counter(self._unknown.values()).most_common(1)
            oldest = next(each for each, address in self._unknown.items() if address == crowd)
            del self._unknown[oldest]
            oldest.end()
            self.evicted += 1
        self._open.add(accepted)
        self._unknown[accepted] = host

    def _leave(self, accepted: "_Accepted") -> None:
        self._open.discard(accepted)
        self._unknown.pop(accepted, None)


class _Accepted(socket.socket):
    """One connection; the door knows until it is closed."""

    door: Door

    def end(self) -> None:
        """Both directions; the event loop, which owns the socket, closes it."""
        with contextlib.suppress(OSError):  # the other side was faster
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes it."""
        super().close()
        self.door._leave(self)


class Listener(socket.socket):
    """A socket that is bound; the event loop listens on it and accepts from it."""

    door: Door

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection and its address."""
        connection, address = super().accept()
        accepted = _Accepted(self.family, self.type, self.proto, fileno=connection.detach())
        accepted.door = self.door
        self.door._enter(accepted, address[0])
        return accepted, address


def bind(host: str, port: int, max_unknown: int) -> tuple[Door, list[Listener]]:
    """Takes the port on every address of a host, without listening yet: connections are refused until then.

    So that a port in use is found before anything is compiled. Raises OSError, in words.
    """
    door, listeners = Door(max_unknown), []
    try:
        for family, kind, protocol, _, address in _addresses(host, port):
            with contextlib.suppress(_NoFamily):
                listeners.append(_bound(family, kind, protocol, address))
                listeners[-1].door = door
        if not listeners:
            raise OSError(f"host {host!r} has no address here; use 127.0.0.1, or 0.0.0.0 for all of them")
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return door, listeners


class _NoFamily(OSError):
    """IPv6 is turned off, and a name has an IPv6 address."""


def _addresses(host: str, port: int) -> Sequence[tuple]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise OSError(
            f"host {host!r} cannot be looked up: {error}; use an address such as 127.0.0.1"
        ) from None
    return found if port else found[:1]  # the system's choice of a port holds for one address


def _bound(family: int, kind: int, protocol: int, address: tuple) -> Listener:
    listener = None
    try:
        listener = Listener(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno == errno.EAFNOSUPPORT or (
            family == socket.AF_INET6 and error.errno == errno.EADDRNOTAVAIL
        ):
            raise _NoFamily from None
        raise _in_words(error, address) from None
    return listener


def _in_words(error: OSError, address: tuple) -> OSError:
    host, port = address[:2]
    remedy = {
        errno.EADDRINUSE: "stop what listens there, or choose another --port (0: any that is free)",
        errno.EACCES: "ports below 1024 belong to the system; choose another --port",
        errno.EADDRNOTAVAIL: "this machine has no such address; use --host 127.0.0.1, or 0.0.0.0 for all of them",
    }.get(error.errno or 0, "choose another --host or --port")
    reason = os.strerror(error.errno).lower() if error.errno else str(error)
    return OSError(f"cannot listen on {host} port {port}: {reason}; {remedy}")
