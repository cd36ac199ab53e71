"""A client for robots; needs numpy, jaxtyping, msgpack and websockets, neither JAX nor the rest of what we depend on.

    with Client("ws://127.0.0.1:8000") as policy:
        print(policy.metadata["observation"])
        reply = policy.infer({"observation/top": image, "observation/state": state, "prompt": "…"}, seed=3)
        reply["actions"]                                                # [k a], float32

openpi's own `WebsocketClientPolicy` talks to the same server; this one has timeouts, waits for a server that is
still starting, takes batches and options, checks a request against the metadata before it sends it, and raises what the
server says. After a refusal, whether it was said here or there, it goes on.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from websockets.exceptions import InvalidMessage, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from vla_jax.serve.checks import check_request, check_size
from vla_jax.serve.server import codec, errors

Observation = Mapping[str, np.ndarray | str | None]


class ServerError(RuntimeError):
    """The policy raised an exception; the text is its traceback. The connection is closed."""


class Client:
    """One connection. Not for several threads at once."""

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000",
        *,
        token: str | None = None,
        wait_s: float = 0.0,
        timeout_s: float | None = 60.0,
        **options: Any,
    ):
        """Connects; `wait_s`: how long to wait for a server that does not listen yet.

        `timeout_s` bounds every reply. Whatever goes wrong while one is awaited, TimeoutError among it, ends the
        connection: a reply that comes late must not be taken for the next request's. Further options go to
        `websockets.sync.client.connect`, e.g. ssl=… for a certificate of one's own.
        """
        self._timeout_s = timeout_s
        headers = {} if token is None else {"Authorization": f"Api-Key {token}"}
        self._open = contextlib.ExitStack()
        self._ws = _connect(self._open, url, wait_s, additional_headers=headers, **options)
        self.metadata: dict[str, Any] = self._receive()
        """What the server expects and gives."""

    def infer(self, observation: Observation, **options: Any) -> dict[str, Any]:
        """`actions` [k a], `seed`, `bucket`, timings, and `plan` where one was asked for.

        Options: those of `metadata["options"]`. Raises errors.Refused (nothing was sent, or nothing was answered: the
        client can be used on), ServerError, TimeoutError.
        """
        check_request(observation, self.metadata)
        return self._ask(_request(observation, options))

    def infer_batch(
        self, observations: Sequence[Observation], options: Sequence[Mapping[str, Any]] | None = None
    ) -> list[dict[str, Any]]:
        """One reply per observation, from one message; `options`: one map for each."""
        options = [{}] * len(observations) if options is None else options
        if len(options) != len(observations):
            raise ValueError(
                f"{len(options)} options for {len(observations)} observations: give one for each"
            )
        for number, observation in enumerate(observations):
            check_request(observation, self.metadata, f"batch[{number}]: ")
        return self._ask({"batch": [_request(*pair) for pair in zip(observations, options)]})["batch"]

    def close(self) -> None:
        """Ends the connection."""
        self._open.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        frame = codec.encode(message)
        check_size(frame, message, self.metadata)
        self._ws.send(frame)
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            frame = self._ws.recv(timeout=self._timeout_s)
        except BaseException:
            self._ws.close_socket()  # without the handshake, for which a server that hangs would be waited for again
            raise
        if isinstance(frame, str):
            raise errors.parse(frame) or ServerError(frame)
        return _own(codec.decode(frame, items=1_000_000))


def _own(message: Any) -> Any:
    """The same with arrays that the robot may write to; decoded ones are read-only views of the frame."""
    if isinstance(message, dict):
        return {key: _own(value) for key, value in message.items()}
    if isinstance(message, list):
        return [_own(value) for value in message]
    return message.copy() if isinstance(message, np.ndarray) else message


def _request(observation: Observation, options: Mapping[str, Any]) -> dict[str, Any]:
    return {**observation, "options": dict(options)} if options else dict(observation)


def _connect(stack: contextlib.ExitStack, url: str, wait_s: float, **options: Any) -> ClientConnection:
    """Connects, again and again while nobody listens, or the server is full, and there is time left."""
    until = time.monotonic() + wait_s
    while True:
        try:
            return stack.enter_context(connect(url, compression=None, max_size=None, **options))
        except (ConnectionError, InvalidStatus, InvalidMessage) as error:
            if not _busy(error) or time.monotonic() >= until:
                raise
            time.sleep(0.1)


def _busy(error: ConnectionError | InvalidStatus | InvalidMessage) -> bool:
    """Whether trying again may help: nobody listens, too many clients, or ours was closed in a crowd."""
    if isinstance(error, InvalidStatus):
        return error.response.status_code == 503
    return isinstance(error, ConnectionError) or isinstance(error.__cause__, EOFError)
