"""Any file of a checkpoint may be damaged: no wrong value comes of it, and no more than one line is said."""

import os
import re
import subprocess
import sys

import pytest

from benchmarks import damage


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return damage.prepare(tmp_path_factory.mktemp("damage") / "run")


def test_flipped_bits_and_exchanged_blocks(truth):
    report = damage.damage(truth, damage.DamageArgs(flips=40, exchanges=10, seed=1, in_turn=True))
    outcomes = report["outcomes"]
    assert sum(outcomes.values()) == 50
    assert {name.split(": ")[1] for name in outcomes} == {"newest", "older", "refused"}  # all that is right


FAILING = """
import resource, shutil, sys
from pathlib import Path
from vla_jax.cli.command import run

def main():
    import jax.numpy as jnp
    from vla_jax.checkpoint import Checkpoints

    folder, failure = Path(sys.argv[1]), sys.argv[2]
    items = {name: {f"w{i}": jnp.ones((100, 40)) * i for i in range(40)} for name in ("params", "ema")}
    if failure == "run is a file":
        folder.write_text("")
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(1, items, {"config": {}})
    checkpoints.wait()
    if failure == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    else:
        shutil.rmtree(folder / "checkpoints")
        if failure == "becomes a file":
            (folder / "checkpoints").write_text("")
    try:
        checkpoints.save(2, items, {"config": {}})
        checkpoints.wait()
    finally:
        checkpoints.close()

run(main)
"""


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("full", "checkpoint 2 could not be written to .*File too large.*the newest whole one is 1"),
        ("gone", "checkpoint 2 could not be written to .*No such file"),
        ("becomes a file", "checkpoint 2 could not be written to .*Not a directory"),
        ("run is a file", "checkpoints cannot be kept in .*Not a directory"),
    ],
)
def test_a_failed_save_is_one_line(tmp_path, failure, message):
    """Of 80 arrays, of which each had a trace of its own to show, on the threads that were writing them."""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", FAILING, str(tmp_path / "run"), failure],
        capture_output=True,
        text=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(f"error: {message}", line)
