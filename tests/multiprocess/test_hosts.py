"""Several processes are one run: the same batches and losses however many, and one story when one of them fails.

The full forms, with the real model and thirty random kills, are benchmarks/hosts.py and benchmarks/kills.py.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.data import toy as toy_data
from vla_jax.checkpoint import load, read_meta
from vla_jax.checkpoint.manifest import write_manifest
from vla_jax.checkpoint.paths import run_path

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).parents[2]
PATIENCE = 600
"""Seconds for what takes ten: machines that run tests may be busy."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    code: int
    said: str
    seconds: float

    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "toy"
    return toy_data.write(folder, [toy_data.make_episode(seed) for seed in range(12)])


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """Runs the toy as `processes` of `devices` each and waits for all; `one_differs` are options of the last only."""
    cache = tmp_path_factory.mktemp("xla")

    def run(run_dir, *options, processes=2, devices=1, one_differs=(), frozen=()):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        environment.pop("XLA_FLAGS", None)
        port = free_port()
        running = []
        for i in range(processes):
            command = [sys.executable, "-m", "tests.multiprocess.toy", str(run_dir), "--data", str(data)]
            command += map(str, options)
            if processes > 1:
                command += ["--coordinator", f"localhost:{port}"]
                command += ["--num-processes", str(processes), "--process-id", str(i)]
            command += map(str, one_differs if i == processes - 1 else ())
            log = open(tmp_path_factory.mktemp("log") / "stderr", "w+")  # noqa: SIM115
            running.append(
                (subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log), log)
            )
        return wait(running, frozen)

    return run


def wait(running, frozen=()) -> list[Ended]:
    """Until all have ended but the `frozen` ones, which never do; kills what is left."""
    ends: dict[int, float] = {}
    patience = time.monotonic() + PATIENCE
    while len(ends.keys() | set(frozen)) < len(running) and time.monotonic() < patience:
        for i, (process, _) in enumerate(running):
            if i not in ends and process.poll() is not None:
                ends[i] = time.monotonic()
        time.sleep(0.05)
    for process, _ in running:
        process.kill()
        process.wait()
    for process, log in running:
        while process.returncode < 0 and "ended suddenly" not in text_of(log) and time.monotonic() < patience:
            time.sleep(0.1)
    first = min(ends.values(), default=0)
    found = []
    for i, (process, log) in enumerate(running):
        found.append(Ended(process.wait(), text_of(log), ends.get(i, float("inf")) - first))
        log.close()
    return found


def text_of(log) -> str:
    log.seek(0)
    return log.read()


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def ok(ended: list[Ended]) -> None:
    for i, one in enumerate(ended):
        assert one.code == 0, f"process {i}:\n{one.said[-3000:]}"


def losses(run_dir) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def rows_of(record: Path, until: int) -> dict[int, dict[int, str]]:
    """Step → row → digest, of all processes together; a row that two processes have must be the same row."""
    found: dict[int, dict[int, str]] = {}
    for path in record.parent.glob(f"{record.stem}.*"):
        for line in map(json.loads, path.read_text().splitlines()):
            step = found.setdefault(line["step"], {})
            for row, digest in line["rows"].items():
                assert step.setdefault(int(row), digest) == digest
    return {step: rows for step, rows in found.items() if step <= until}


def assert_same_bytes(run_dir, whole) -> None:
    assert (run_dir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert read_meta(run_dir)["fingerprints"] == read_meta(whole)["fingerprints"]
    for item in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, load(run_dir, item), load(whole, item))


def test_any_number_of_hosts_gives_the_same_run(start, tmp_path):
    """8 devices in one process; and in two, asked to stop through one of them, continued by four."""
    one, many = tmp_path / "one", tmp_path / "many"
    ok(start(one, "--fsdp", 2, "--record", tmp_path / "one.x", processes=1, devices=8))
    stopped = start(many, "--fsdp", 2, "--record", tmp_path / "many.x", "--fault", "SIGTERM:1:6", devices=4)
    ok(stopped)
    assert (
        "stopped and saved at step 7 of 12" in stopped[0].said
    )  # the next one that both could still agree upon
    assert "stopped" not in stopped[1].said  # one process speaks for all
    at = read_meta(many)["step"]
    assert at == 7
    first = rows_of(tmp_path / "many.x", at)
    ok(start(many, "--fsdp", 2, "--record", tmp_path / "again.x", processes=4, devices=2))
    rest = rows_of(tmp_path / "again.x", 12)
    whole = rows_of(tmp_path / "one.x", 12)
    assert set(whole) == set(range(1, 13)) and all(len(rows) == 8 for rows in whole.values())
    assert first | rest == whole and not set(first) & set(rest)
    np.testing.assert_allclose(losses(many), losses(one), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        load(many, "params"),
        load(one, "params"),
    )


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run of two processes that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole")
    ok(start(run_dir))
    return run_dir


def test_killed_processes_are_named_and_the_run_ends_with_the_same_bytes(start, whole, tmp_path):
    killed, survivor = reversed(start(tmp_path, "--fault", "SIGKILL:1:7", "--host-timeout", 8))
    assert killed.code == -9 and "ended suddenly" in killed.said
    assert survivor.code == 3 and survivor.seconds < 60
    (error,) = survivor.errors()
    assert re.search(r"process 1 \(.+\) is gone: silent for \d+ s, last seen at step \d, ", error)

    killed, survivor = start(
        tmp_path, "--fault", "save:0:8"
    )  # the one that the others know each other through
    assert killed.code == -9 and survivor.code != 0 and survivor.seconds < 60
    assert "process 0, the coordinator at localhost" in survivor.errors()[-1]
    assert read_meta(tmp_path)["step"] in (4, 8)

    whole_ones = [path for path in (tmp_path / "checkpoints").glob("*/params") if path.parent.name.isdigit()]
    newest = max(whole_ones, key=lambda path: int(path.parent.name))
    later = shutil.copytree(newest.parent, newest.parent.with_name("11"))
    meta = json.loads((later / "meta" / "metadata").read_text())
    (later / "meta" / "metadata").write_text(json.dumps(meta | {"step": 11}))
    write_manifest(run_path(later), 11)
    for file in (later / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:50])
    ended = start(tmp_path)
    ok(ended)
    warnings = [line for one in ended for line in one.said.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "/11 is unreadable" in warnings[0]
    assert_same_bytes(tmp_path, whole)
    ledger = json.loads((tmp_path / "goodput.json").read_text())
    assert ledger["starts"] == 3 and ledger["seconds"]["training"] > 0


def test_a_coordinator_that_freezes_is_named_by_the_others(start, tmp_path):
    """Its sockets stay open, so nothing fails: a call to it would wait for ever, as the collective does."""
    frozen, survivor = start(tmp_path, "--fault", "SIGSTOP:0:6", "--host-timeout", 8, frozen=(0,))
    assert frozen.code == -9 and survivor.code == 3, survivor.said[-3000:]
    (error,) = survivor.errors()
    named = re.search(r"process 0 \(.+\) is gone: silent for (\d+) s, last seen at step \d, .*", error)
    assert 8 <= int(named[1]) < 60 and "its coordinator at localhost:" in named[0]


def test_who_dies_on_the_way_out_keeps_nobody(start, whole, tmp_path):
    first, second = start(tmp_path, "--fault", "leave:1:0", "--host-timeout", 5)
    assert second.code == -9 and first.code == 0 and first.seconds < 60
    assert "another process did not come to the end" in first.said and not first.errors()
    assert_same_bytes(tmp_path, whole)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error:1:5", "the disk went away"),
        ("full:1:4", "checkpoint 4 could not be written"),
    ],
)
def test_an_error_of_one_process_is_one_line_on_both(start, tmp_path, fault, message):
    first, second = start(tmp_path, "--fault", fault)
    assert (first.code, second.code) == (3, 2)
    assert (
        len(second.errors()) == 1 and message in second.errors()[0] and "process 1 of 2" in second.errors()[0]
    )
    (error,) = first.errors()
    assert re.search(r"process 1 \(.+\) failed: .*" + message, error)
    assert not (tmp_path / "checkpoints" / "4" / "params").exists() or fault.startswith("error")


def test_a_process_that_hangs_is_named_with_everyones_stacks(start, tmp_path):
    first, second = start(tmp_path, "--fault", "sleep:1:6", "--hang-timeout", 30, "--save-every", 100)
    assert first.code == second.code == 3
    for one in (first, second):
        assert "most recent call first" in one.said
        (error,) = one.errors()
        assert re.search(r"stuck: no progress for \d+ s; process 1 .* is at step 6, waiting for data", error)


def test_a_process_with_another_config_is_named_before_anything_is_done(start, tmp_path):
    ended = start(tmp_path / "run", one_differs=("--batch-size", "16"))
    for one in ended:
        assert one.code in (2, 3)  # 3 where the other's error was heard of first
        (error,) = one.errors()
        assert re.search(r"process 1 \(.+\) has another config .* train.batch_size=16 instead of .*=8", error)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_is_not_shared_is_refused_before_anything_is_written(start, tmp_path):
    ended = start(tmp_path / "here" / "run", one_differs=("--unshared", tmp_path / "there" / "run"))
    for one in ended:
        assert one.code in (2, 3)
        (error,) = one.errors()
        assert re.search(
            r"process 1 \(.+\) does not find in its run directory .*there/run .* all hosts share", error
        )
    assert not list(tmp_path.iterdir())
