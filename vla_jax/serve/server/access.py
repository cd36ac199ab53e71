"""Who may connect: plain HTTP, the token, and how many clients there are at a time."""

import hmac
import http
from collections.abc import Callable

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from vla_jax.serve.server.config import ServeConfig
from vla_jax.serve.server.logs import Logs
from vla_jax.serve.server.metrics import CONTENT_TYPE, Metrics


class Access:
    """Answers the request with which every connection begins."""

    def __init__(self, config: ServeConfig, metrics: Metrics, logs: Logs, clients: Callable[[], int]):
        self._token, self._max_connections = config.secret(), config.max_connections
        self._metrics, self._logs, self._clients = metrics, logs, clients

    def answer(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """What plain HTTP asks for, or a refusal; None lets the websocket begin."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path not in ("/", "/metrics"):
            return connection.respond(http.HTTPStatus.NOT_FOUND, "there are /, /healthz and /metrics\n")
        if not self._authorised(request):
            self._logs.warning("unauthorised", peer=peer(connection), path=path)
            return connection.respond(
                http.HTTPStatus.UNAUTHORIZED, "the header Authorization: Api-Key TOKEN is missing or wrong\n"
            )
        if path == "/metrics":
            headers = Headers({"Content-Type": CONTENT_TYPE, "Connection": "close"})
            body = self._metrics.text()
            headers["Content-Length"] = str(len(body))
            return Response(200, "OK", headers, body)
        if self._clients() >= self._max_connections:
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE,
                f"overloaded: {self._clients()} clients are connected\n",
            )
        return None

    def _authorised(self, request: HttpRequest) -> bool:
        if self._token is None:
            return True
        sent = request.headers.get_all("Authorization")
        wanted = f"Api-Key {self._token}".encode()
        return len(sent) == 1 and hmac.compare_digest(sent[0].encode("utf-8", "replace"), wanted)


def peer(connection: ServerConnection) -> str:
    """The address of a client, for the log."""
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)
