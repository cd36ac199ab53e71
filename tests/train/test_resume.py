"""Killed at any moment and started again, a run ends with the same bytes as one that was left alone."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from vla_jax.checkpoint import load, read_meta


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Runs the toy in a process; compiled programs are shared between the processes."""
    cache = tmp_path_factory.mktemp("xla")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(run_dir, *options):
        command = [sys.executable, "-m", "tests.train.toy", str(run_dir), *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return start


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole")
    done = toy(run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


def assert_same(run_dir, whole):
    assert (run_dir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert read_meta(run_dir)["fingerprints"] == read_meta(whole)["fingerprints"]
    for item in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, load(run_dir, item), load(whole, item))


def test_metrics_are_complete(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "val/loss" in line] == [4, 8, 12]
    assert lines[-2]["loss"] < lines[0]["loss"] / 1.2
    assert all(line["bins"][1] == pytest.approx(2 * line["loss"]) for line in lines if "bins" in line)


def test_killed_again_and_again_it_ends_with_the_same_bytes(toy, whole, tmp_path):
    kills = [
        ("--signal-at-step", "2"),  # before the first checkpoint
        ("--kill-after-save", "4"),
        ("--signal-at-step", "7"),
        ("--kill-after-save", "8"),
        ("--kill-after-save", "12"),
    ]
    for kill in kills:
        done = toy(tmp_path, *kill)
        assert done.returncode == -9, done.stderr
    done = toy(tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, whole)


def test_killed_while_saving_leaves_no_half_checkpoint(toy, whole, tmp_path):
    assert toy(tmp_path, "--kill-after-save", "8").returncode == -9
    assert read_meta(tmp_path)["step"] == 4
    # The metrics up to the lost checkpoint are there; they are cut off when training goes on from step 4.
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 8
    assert "continuing" in toy(tmp_path).stderr
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_asked_to_stop_saves_and_exits_well(toy, whole, tmp_path, signal):
    done = toy(tmp_path, "--signal-at-step", "6", "--signal", signal)
    assert done.returncode == 0, done.stderr
    assert "run the same command to continue" in done.stderr
    assert 1 <= read_meta(tmp_path)["step"] < 12
    assert toy(tmp_path).returncode == 0
    assert_same(tmp_path, whole)


def test_finished_run_says_so(toy, whole):
    before = (whole / "metrics.jsonl").stat().st_mtime_ns
    done = toy(whole)
    assert done.returncode == 0 and "is finished: step 12 of 12" in done.stderr
    assert (whole / "metrics.jsonl").stat().st_mtime_ns == before


def test_other_config_is_one_line(toy, whole):
    done = toy(whole, "--steps", "20")
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (
        len(error) == 1
        and "planned with train.steps=12, not 20; --extend" in error[0]
        and "Traceback" not in done.stderr
    )


def test_failing_writes_are_one_line_and_leave_the_last_checkpoint(toy, tmp_path):
    done = toy(tmp_path, "--file-limit", "3000")
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert error.startswith("error: checkpoint 4 could not be written")
    assert "Traceback" not in done.stderr and "never awaited" not in done.stderr
    assert toy(tmp_path).returncode == 0
