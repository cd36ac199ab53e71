"""Spikes against numpy, and in a run: left out, counted, remembered over a restart."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.train.toy import make_job, small_loop
from vla_jax.sharding import MeshConfig
from vla_jax.train import ledger, spikes
from vla_jax.train.ledger import BUCKETS, EVERY, Ledger
from vla_jax.train.loop import fit
from vla_jax.train.profile import Steps, parse


@pytest.mark.parametrize("window", [4, 7])
def test_against_numpy(window):
    rng = np.random.default_rng(0)
    series = rng.normal(size=(40, 2)).astype(np.float32)
    series[[11, 30], 0] = 50  # the loss
    series[20, 1] = 50  # the gradient norm
    series[25] = np.nan
    state = nn.unbox(spikes.empty(window))
    step = jax.jit(lambda s, v: (spikes.is_spike(s, v[0], v[1], 3.0), spikes.remember(s, v[0], v[1])))
    history, found = [], []
    for i, values in enumerate(series):
        spike, state = step(state, values)
        last = np.asarray(history[-window:])
        expected = len(history) >= window // 2 and bool((values > last.mean(0) + 3 * last.std(0)).any())
        assert bool(spike) == expected, i
        found += [i] * expected
        if np.isfinite(values).all():
            history.append(values)
    assert {11, 20, 30} <= set(found)


def test_ledger_over_a_crash(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    path = tmp_path / "goodput.json"

    def wait(seconds):
        nonlocal now
        now += seconds

    one = Ledger(path, step=0, begun=0.0)
    wait(5)
    with one.spent("compile"):
        wait(10)
    one.begin()
    for step in (1, 2, 3):
        wait(4)
        with one.spent("data"):
            wait(1)
        if step == 2:
            with one.spent("checkpoint"):
                wait(2)
            one.saved(2)
    one.write()  # and a crash: step 3 is lost, and so is what is not yet in the file
    wait(1000)
    two = Ledger(path, step=2, begun=now)
    wait(3)
    two.begin()
    wait(4)
    expected = {
        "training": 12,
        "lost": 4,
        "start": 8,
        "compile": 10,
        "data": 3,
        "checkpoint": 2,
        "evaluation": 0,
    }
    assert two.goodput() == pytest.approx(12 / sum(expected.values()))
    assert two.seconds == pytest.approx(expected) and set(BUCKETS) == set(expected)
    assert "in 2 starts" in two.table() and "training" in two.table()


def test_a_start_that_dies_early_is_in_the_ledger(tmp_path, monkeypatch):
    """While compiling, and between two lines of the log."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    path = tmp_path / "goodput.json"

    def saved():
        return json.loads(path.read_text())

    first = Ledger(path, step=0, begun=93.0)
    assert saved()["starts"] == 1 and saved()["seconds"]["start"] == 7
    killed = first.spent("compile")
    killed.__enter__()
    now += 1000

    second = Ledger(path, step=0, begun=now - 5)
    assert saved()["starts"] == 2 and saved()["seconds"]["start"] == 12
    with second.spent("compile"):
        now += 30
    assert saved()["seconds"]["compile"] == 30
    second.begin()
    written, write = [], ledger.write_atomically
    monkeypatch.setattr(ledger, "write_atomically", lambda *args: (written.append(now), write(*args)))
    begun = now
    for _ in range(25):
        now += 3
        with second.spent("data"):
            now += 1
    known = saved()["seconds"]["training"] + saved()["seconds"]["data"]
    assert now - begun - known <= EVERY  # nothing was logged or saved, and yet
    assert len(written) <= 100 / EVERY  # of 50 changes
    third = Ledger(path, step=0, begun=now)
    assert third.starts == 3 and third.seconds["lost"] > 60 and third.seconds["training"] == 0


def test_profile_traces_the_steps_asked_for(tmp_path):
    loop = small_loop(steps=4, val_every=0)
    fit(make_job(loop, MeshConfig()), loop, tmp_path, profile=parse("2:3"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    lines = [json.loads(line) for line in (tmp_path / "perf.jsonl").read_text().splitlines()]
    assert {"perf/samples_per_second_per_chip", "perf/goodput", "perf/ledger/checkpoint"} <= lines[0].keys()
    assert lines[-1]["perf/ledger/training"] > 0
    assert parse("2:3") == Steps(2, 3)
    for wrong in ("3:2", "0:1", "5", "a:b"):
        with pytest.raises(ValueError, match="--profile"):
            parse(wrong)
