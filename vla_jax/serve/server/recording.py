"""Requests and replies on disk, to be served again.

A directory holds `server.json` (the metadata) and `requests-00000.msgpack`, …: msgpack maps one after another,
{"time": s, "request": bytes, "reply": bytes}, frames exactly as they were on the wire. A reply names the seed and the
bucket of every row, so that the record determines its actions bit for bit.
"""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from vla_jax.files import read_json
from vla_jax.serve.server.logs import Logs
from vla_jax.serve.server.metrics import Metrics

_WAITING, _WAITING_BYTES = 256, 64 * 2**20
"""Most records, and bytes, that wait for the disk."""


class Recorded(NamedTuple):
    """One request that was answered."""

    time: float
    request: bytes
    reply: bytes


class Recorder:
    """Writes in a thread of its own; what the disk cannot keep up with, or has no room for, is counted and dropped."""

    def __init__(
        self, folder: Path, metadata: dict[str, Any], *, max_bytes: int, metrics: Metrics, logs: Logs
    ):
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "server.json"
        text = json.dumps(metadata, indent=2)
        if known.exists() and known.read_text() != text:
            raise ValueError(
                f"{folder} holds requests to another policy or to other settings; record into another directory"
            )
        known.write_text(text)
        number = len(list(folder.glob("requests-*.msgpack")))
        self._file = (folder / f"requests-{number:05d}.msgpack").open("xb")
        self._left, self._metrics, self._logs = max_bytes, metrics, logs
        self._queue: queue.Queue[Recorded | None] = queue.Queue(_WAITING)
        self._waiting, self._lock = 0, threading.Lock()
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()

    def add(self, request: bytes, reply: bytes) -> None:
        """Queues an exchange for the writer's thread without waiting; drops and counts it where that is too slow."""
        record = Recorded(time.time(), request, reply)
        try:
            self._count(record)
            try:
                self._queue.put_nowait(record)
            except queue.Full:
                self._forget(record)
                raise
        except queue.Full:
            self._metrics.recorded.labels("dropped").inc()
            self._logs.warning("record dropped", why="the disk is slower than the requests")

    def _count(self, record: Recorded) -> None:
        """Its bytes wait from now on. Raises queue.Full."""
        with self._lock:
            if self._waiting and self._waiting + _size(record) > _WAITING_BYTES:
                raise queue.Full
            self._waiting += _size(record)

    def _forget(self, record: Recorded) -> None:
        with self._lock:
            self._waiting -= _size(record)

    def close(self, timeout_s: float = 2.0) -> None:
        """Writes what waits, for so long; what a disk that hangs has not taken by then is lost, and said."""
        until = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._logs.warning("records lost", bytes=self._waiting, why="the disk did not take them in time")
        else:
            self._file.close()

    def _write(self) -> None:
        while self._write_next():
            pass

    def _write_next(self) -> bool:
        """False at the end. A function of its own, so that no variable holds the last record until the next one."""
        if (record := self._queue.get()) is None:
            return False
        self._keep(record)
        self._forget(record)
        return True

    def _keep(self, record: Recorded) -> None:
        data: Any = msgpack.packb(record._asdict())
        if len(data) > self._left:
            self._metrics.recorded.labels("dropped").inc()
            self._logs.warning("record dropped", why="the recording has reached its limit")
            return
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            self._metrics.recorded.labels("dropped").inc()
            self._logs.error("record dropped", error)
            self._left = 0
            return
        self._left -= len(data)
        self._metrics.recorded.labels("written").inc()


def _size(record: Recorded) -> int:
    return len(record.request) + len(record.reply)


def read_metadata(folder: Path) -> dict[str, Any]:
    """What the recorded server expected and gave. Raises OSError, ValueError."""
    return read_json(folder / "server.json")


def read(folder: Path) -> Iterator[Recorded]:
    """All records in the order of their writing; the torn end of a file (a server that was killed) is left out.

    Raises ValueError, in one line, where a file holds anything else.
    """
    files = sorted(folder.glob("requests-*.msgpack"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no requests-*.msgpack; give a directory that --record wrote")
    for path in files:
        with path.open("rb") as file:
            records = msgpack.Unpacker(file, max_buffer_size=2**31 - 1, ext_hook=_no_extension)
            while True:
                try:
                    record = _checked(next(records, None))
                except (ValueError, TypeError, msgpack.UnpackException) as error:
                    raise ValueError(f"{path} is no record of a server: {error or 'it is damaged'}") from None
                if record is None:
                    break
                yield record


def _checked(values: Any) -> Recorded | None:
    """A record as it was written; None at the end of the file. Raises TypeError."""
    if values is None:
        return None
    record = Recorded(**values)
    if not (isinstance(record.request, bytes) and isinstance(record.reply, bytes)):
        raise TypeError("a request or a reply is not of bytes")
    return record


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"it holds a value of extension type {code}")
