"""Structured logs: one JSON object per line, and no flood when a client misbehaves."""

import json
import logging
import sys
import time
from typing import Any, TextIO

_LOGGER = logging.getLogger("vla_jax.serve")
_PER_SECOND = 5


class JsonFormatter(logging.Formatter):
    """{"time": …, "level": …, "event": …, and the event's own fields}."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class Logs:
    """Events of a server. More than a few of one kind within a second are counted, not written."""

    def __init__(self):
        self._windows: dict[str, tuple[int, int]] = {}

    def info(self, event: str, **fields: Any) -> None:
        """Something happened as it should."""
        self._write(logging.INFO, event, None, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """A client or the surroundings are at fault."""
        self._write(logging.WARNING, event, None, fields)

    def error(self, event: str, error: BaseException | str, **fields: Any) -> None:
        """We are at fault: with the traceback, which may be text already."""
        if isinstance(error, str):
            self._write(logging.ERROR, event, None, {**fields, "traceback": error})
        else:
            self._write(logging.ERROR, event, error, fields)

    def _write(self, level: int, event: str, error: BaseException | None, fields: dict[str, Any]) -> None:
        second, (window, count) = int(time.monotonic()), self._windows.get(event, (0, 0))
        suppressed = 0
        if window != second:
            suppressed, count = max(0, count - _PER_SECOND), 0
        self._windows[event] = (second, count + 1)
        if count >= _PER_SECOND:
            return
        if suppressed:
            fields = {**fields, "suppressed_before": suppressed}
        _LOGGER.log(level, event, extra={"fields": fields}, exc_info=error)


def write_to(stream: TextIO = sys.stderr) -> None:
    """Sends the server's log to a stream, as JSON lines."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    _LOGGER.handlers[:] = [handler]
    _LOGGER.propagate = False
    _LOGGER.setLevel(logging.INFO)
