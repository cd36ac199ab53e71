"""Records hold the frames as they were, survive a kill, and stop at their limit."""

import threading

import msgpack
import numpy as np
import pytest

from tests.serve.server.harness import SPEC, Echo, eventually, observe, serving
from vla_jax.serve.server import codec, recording
from vla_jax.serve.server.logs import Logs
from vla_jax.serve.server.metrics import Metrics
from vla_jax.serve.server.recording import Recorder, read, read_metadata


def recorder(folder, *, max_bytes: int = 10**9, metadata: dict | None = None, metrics: Metrics | None = None):
    return Recorder(
        folder, metadata or SPEC.metadata(), max_bytes=max_bytes, metrics=metrics or Metrics(), logs=Logs()
    )


def test_what_is_answered_is_recorded_and_what_is_refused_is_not(tmp_path):
    for run in range(2):  # a second server goes on in the same directory
        keeper = recorder(tmp_path)
        with serving(Echo(), recorder=keeper) as server, server.client() as client:
            client.infer(observe(run))
            assert server.ask(observe() | {"prompt": 3}).startswith("invalid")
            client.infer_batch([observe(5), observe(6)])
        keeper.close()
    records = list(read(tmp_path))
    requests, replies = ([codec.decode(data) for data in column] for column in list(zip(*records))[1:])
    np.testing.assert_array_equal(requests[0]["observation/state"], [0, 0])
    assert [reply["actions"][0, 0] for reply in (replies[0], replies[2])] == [0, 1]
    assert [row["actions"][0, 0] for row in replies[1]["batch"]] == [5, 6]
    assert len(records) == 4 and records[0].time <= records[3].time
    assert read_metadata(tmp_path) == SPEC.metadata()


def test_a_torn_end_is_left_out(tmp_path):
    keeper = recorder(tmp_path)
    for number in range(3):
        keeper.add(b"request", bytes([number]))
    keeper.close()
    (file,) = tmp_path.glob("*.msgpack")
    file.write_bytes(file.read_bytes()[:-4])
    assert [record.reply for record in read(tmp_path)] == [b"\x00", b"\x01"]


def test_the_limit_holds_and_is_counted(tmp_path):
    metrics = Metrics()
    keeper = recorder(tmp_path, max_bytes=1000, metrics=metrics)
    for _ in range(5):
        keeper.add(bytes(300), b"")
    keeper.close()
    eventually(lambda: metrics.value("vla_recorded_total", outcome="dropped") == 3)
    assert metrics.value("vla_recorded_total", outcome="written") == 2 == len(list(read(tmp_path)))


def test_what_waits_for_a_slow_disk_is_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "_WAITING_BYTES", 1000)
    metrics, gate = Metrics(), threading.Event()
    keeper = recorder(tmp_path, metrics=metrics)
    keep = keeper._keep
    monkeypatch.setattr(keeper, "_keep", lambda record: (gate.wait(30), keep(record)))
    for _ in range(5):
        keeper.add(bytes(300), bytes(100))
    assert metrics.value("vla_recorded_total", outcome="dropped") == 3
    gate.set()
    eventually(lambda: keeper._waiting == 0)
    keeper.add(bytes(5000), b"")  # larger than the bound, but nothing else waits
    keeper.close()
    assert [len(record.request) for record in read(tmp_path)] == [300, 300, 5000]


def test_another_policys_record_is_not_continued(tmp_path):
    recorder(tmp_path).close()
    with pytest.raises(ValueError, match="record into another directory"):
        recorder(tmp_path, metadata={"horizon": 4})
    with pytest.raises(FileNotFoundError, match="holds no requests"):
        list(read(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "content",
    [
        msgpack.packb([1, 2]),
        msgpack.packb({"time": 0.0, "request": b"", "reply": b"", "more": 1}),
        msgpack.packb({"time": 0.0, "request": "text", "reply": b""}),
        msgpack.packb(msgpack.ExtType(5, b"cposix\nsystem\n")),
        msgpack.packb({"time": 0.0, "request": b"", "reply": msgpack.Timestamp(1)}),
        b"\xc1",
        b"\x81" * 2000,
    ],
)
def test_a_record_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "requests-00000.msgpack").write_bytes(content)
    with pytest.raises(ValueError, match="is no record of a server") as refused:
        list(read(tmp_path))
    assert "\n" not in str(refused.value)
