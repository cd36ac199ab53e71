"""Benchmarks fail on their own bars, and only there."""

import json
import re
import sys

import pytest

from benchmarks import kills, save_memory

GOOD = {
    "runs_finished": 2,
    "runs_bit_identical": 2,
    "slowest_survivor_seconds": 31.0,
    "each": [
        {"survivor_code": 3, "message": "error: process 1 is gone"},
        {"survivor_code": 0, "message": ""},
    ],
    "stops": [{"victim": 0, "codes": [0, 0], "same": True}],
}


def stop(**changes):
    return {"stops": [GOOD["stops"][0] | changes]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"runs_bit_identical": 1}, "other bytes"),
        (stop(same=False), "other bytes"),
        ({"slowest_survivor_seconds": 60.0}, "took 60 s"),
        ({"each": [{"survivor_code": -6, "message": ""}]}, r"survivors of kills \[1\] ended without a word"),
        (stop(codes=[0, 3]), r"request 1 to stop the processes ended with \[0, 3\]"),
        (stop(victim=None), "request 1 to stop was not delivered"),
    ],
)
def test_kills(change, message):
    found = kills.failures(GOOD | change)
    assert len(found) == (message is not None)
    if message:
        assert re.search(message, found[0])


@pytest.mark.parametrize("peak", [0.1, 2.0])
def test_memory_of_a_save(tmp_path, monkeypatch, capsys, peak):
    """The bar of so small a state is about 1 GiB."""
    held = {"VmRSS": 5 * 2**30, "VmHWM": int((5 + peak) * 2**30)}
    monkeypatch.setattr(save_memory, "memory", held.__getitem__)
    report = tmp_path / "report.json"
    monkeypatch.setattr(
        sys, "argv", ["save_memory", "--gib", "0.001", "--devices", "1", "1", "--json", str(report)]
    )
    if peak < 1:
        save_memory.main()
    else:
        with pytest.raises(SystemExit, match=r"^1$"):
            save_memory.main()
        assert "error: 1 devices: the peak is 2.00 GiB, the bar 1.00" in capsys.readouterr().err
    assert [case["within"] for case in json.loads(report.read_text())] == 2 * [peak < 1]
