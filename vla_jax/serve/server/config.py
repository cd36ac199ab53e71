"""Everything about serving that is not the policy."""

import dataclasses
import ipaddress
import math
import re
import ssl
from pathlib import Path

from vla_jax.finite import finite
from vla_jax.serve.server.listener import Door, Listener, bind


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class ServeConfig:
    """Where and how a server listens, and its limits."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only. 0.0.0.0: from everywhere."""
    port: int = 8000
    """0 lets the system choose; the log says which."""
    token: str | None = None
    """Clients must send it (header `Authorization: Api-Key TOKEN`; openpi-client: api_key=TOKEN)."""
    token_file: Path | None = None
    """The same from a file, so that it does not stand in the list of processes."""
    tls_cert: Path | None = None
    """Certificate chain (PEM): the server speaks wss:// and https:// only."""
    tls_key: Path | None = None
    """Its private key (PEM)."""
    max_wait_ms: float = 2.0
    """How long a call that is not full waits for further clients."""
    max_queue: int = 256
    """Rows that wait or are computed; beyond, requests are refused as overloaded."""
    deadline_ms: float = 10_000.0
    """Longest time from a request to its answer; a request may ask for less."""
    max_connections: int = 128
    """Clients at a time; beyond, connections are refused (HTTP 503). As many more may be in the middle of connecting;
    beyond, the oldest of these is closed."""
    drain_s: float = 30.0
    """After SIGTERM: how long requests that were accepted may take to be answered; the process then ends, with exit
    code 1 where some were not. A second SIGTERM does not wait."""
    rename: tuple[str, ...] = ()
    """ROBOT_KEY=OUR_KEY, for robots whose keys have other names: observation/image=observation/top"""

    def __post_init__(self):
        for name in ("max_queue", "max_connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("max_wait_ms", "drain_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative")
        if self.deadline_ms <= 0:
            raise ValueError(f"deadline_ms={self.deadline_ms}: must be above 0")
        for name in ("max_wait_ms", "deadline_ms", "drain_s"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: must be a finite number")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port={self.port}: ports are 0 to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both, or neither")
        if self.token is not None and self.token_file is not None:
            raise ValueError("token and token_file are both given; use one")
        for entry in self.rename:
            if not re.fullmatch(r"[^=]+=[^=]+", entry):
                raise ValueError(f"rename {entry!r}: use ROBOT_KEY=OUR_KEY")
        if len(self.renames) < len(self.rename):
            raise ValueError(f"rename {' '.join(self.rename)}: a robot's key is given twice")

    @property
    def renames(self) -> dict[str, str]:
        """The robot's key → ours."""
        return dict(entry.split("=") for entry in self.rename)

    @property
    def beyond_loopback(self) -> bool:
        """Whether other machines can connect."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"

    def secret(self) -> str | None:
        """The token that clients must send. Raises ValueError, OSError."""
        token = self.token
        if self.token_file is not None:
            try:
                token = self.token_file.read_text("ascii").strip()
            except UnicodeDecodeError:
                raise ValueError(f"token_file {self.token_file} is not ASCII text") from None
        if token is not None and not re.fullmatch(r"[!-~]{8,}", token):
            where = "the token" if self.token_file is None else f"the token in {self.token_file}"
            raise ValueError(f"{where} must be 8 or more printable ASCII characters without spaces")
        return token

    def tls(self) -> ssl.SSLContext | None:
        """The TLS settings. Raises OSError, ValueError, which name the file that is not right."""
        if self.tls_cert is None:
            return None
        if self.tls_key is None:
            raise ValueError("tls_cert is given without tls_key; give both, or neither")
        return tls_context(self.tls_cert, self.tls_key)

    def bind(self) -> tuple[Door, list[Listener]]:
        """Takes the port, without listening on it yet. Raises OSError."""
        return bind(self.host, self.port, self.max_connections)


def tls_context(cert: Path, key: Path) -> ssl.SSLContext:
    """Settings of a TLS server from two PEM files. Raises OSError, ValueError, which name the file."""
    for name, path in {"tls_cert": cert, "tls_key": key}.items():
        try:
            path.read_bytes()
        except OSError as error:
            raise OSError(f"{name} {path} cannot be read: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cert)
    except ssl.SSLError as error:
        raise ValueError(f"tls_cert {cert} holds no certificate in PEM form ({_reason(error)})") from None

    def no_password() -> str:  # OpenSSL would otherwise ask on the terminal
        raise ValueError(f"tls_key {key} is encrypted; give the key without a password")

    try:
        context.load_cert_chain(cert, key, password=no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"tls_key {key} does not belong to tls_cert {cert}") from None
        raise ValueError(f"tls_key {key} holds no private key in PEM form ({_reason(error)})") from None
    return context


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()
