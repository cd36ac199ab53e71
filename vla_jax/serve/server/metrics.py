"""What `/metrics` shows, in Prometheus' text format."""

import jax.monitoring
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self):
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "vla_requests", "Messages by what became of them", ["outcome"], registry=registry
        )
        """outcome: ok, error (an exception of the policy), oversized, gone (the client has left), or a refusal's
        code."""
        self.rows = Counter("vla_rows", "Observations answered", registry=registry)
        self.request_s = Histogram(
            "vla_request_seconds", "From message to reply", registry=registry, buckets=_SECONDS
        )
        self.queue_s = Histogram(
            "vla_queue_seconds", "Wait of a row for its call", registry=registry, buckets=_SECONDS
        )
        self.infer_s = Histogram(
            "vla_infer_seconds", "One call of the policy", registry=registry, buckets=_SECONDS
        )
        self.batch_rows = Histogram(
            "vla_batch_rows", "Rows in a call, without padding", registry=registry, buckets=_ROWS
        )
        self.split = Counter(
            "vla_batch_split", "Calls that raised and were repeated by row", registry=registry
        )
        self.pending = Gauge("vla_pending_rows", "Rows that wait or are computed", registry=registry)
        self.queued = Gauge("vla_queued_rows", "Rows that are ready and wait for a call", registry=registry)
        self.connections = Gauge("vla_connections", "Open connections", registry=registry)
        self.recorded = Counter(
            "vla_recorded", "Requests by what became of their record", ["outcome"], registry=registry
        )
        self.compilations = Counter(
            "vla_compilations", "Programs compiled by this process", registry=registry
        )
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def text(self) -> bytes:
        """The body of `/metrics`."""
        return generate_latest(self.registry)

    def value(self, name: str, **labels: str) -> float:
        """One sample, e.g. value("vla_requests_total", outcome="ok"); 0 before the first event."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def _listen(self, event: str, duration_secs: float, **labels: str | int) -> None:
        if event == _COMPILED:
            self.compilations.inc()
