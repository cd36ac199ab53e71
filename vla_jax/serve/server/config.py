"""Everything about serving that is not the policy."""

import dataclasses
import ipaddress
import re
import ssl
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    """Clients at a time; beyond, connections are refused (HTTP 503)."""
    drain_s: float = 30.0
    """After SIGTERM: how long requests that were accepted may take to be answered."""
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
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port={self.port}: ports are 0 to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both, or neither")
        if self.token is not None and self.token_file is not None:
            raise ValueError("token and token_file are both given; use one")
        for entry in self.rename:
            if not re.fullmatch(r"[^=]+=[^=]+", entry):
                raise ValueError(f"rename {entry!r}: use ROBOT_KEY=OUR_KEY")

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
        token = self.token_file.read_text().strip() if self.token_file is not None else self.token
        if token is not None and not re.fullmatch(r"[!-~]{8,}", token):
            raise ValueError("the token must be 8 or more printable ASCII characters without spaces")
        return token

    def tls(self) -> ssl.SSLContext | None:
        """The TLS settings. Raises OSError (ssl.SSLError) where the files are not right."""
        if self.tls_cert is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.tls_cert, self.tls_key)
        return context
