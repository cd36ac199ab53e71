"""The tiny model's real programs, compiled for pods that are not here."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'vla_jax[tpu]'",
)


def compile_for(tmp_path, *options):
    out = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "launch.compile",
        "--config",
        "tests/aot/tiny.py",
        "--json",
        str(out),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    return done, json.loads(out.read_text()) if out.exists() else None


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """The training step with the splash kernel, on 16 chips."""
    tmp_path = tmp_path_factory.mktemp("train")
    hlo = tmp_path / "step.hlo"
    kernel = ("--model.attention", "splash", "--model.backbone.text.head-dim", "128")
    done, report = compile_for(tmp_path, "--topology", "v5e:4x4", "--hlo", str(hlo), *kernel)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, report, hlo.read_text()


def test_the_training_step_fits_and_is_sharded(train):
    text, report, _ = train
    assert 0 < report["memory"]["arguments"] < report["memory"]["limit"] == int(15.75 * 2**30)
    assert report["memory"]["headroom"] > 15 * 2**30
    assert report["unsharded_share"] < 0.02
    assert report["mesh"] == {"data": 1, "fsdp": 16, "sequence": 1, "tensor": 1}
    assert "headroom" in text and "predicted:" in text and "could not be read" not in text


def test_every_collective_runs_over_fsdp_and_parameters_are_gathered(train):
    _, report, _ = train
    kinds = {(c["kind"], tuple(c["axes"])): c for c in report["collectives"]}
    assert {axes for _, axes in kinds} <= {("fsdp",), ()}
    moved = sum(c["bytes"] for c in report["collectives"])
    parameters = report["memory"]["arguments"] / 4  # parameters, EMA and two moments
    assert (
        moved > 2 * parameters
    )  # gathered for the forward and the backward pass, in half the bytes, and reduced
    assert not report["unknown"]
    assert 0 < report["mfu"] < 1 and report["step_seconds"] > 0


def test_splash_is_in_the_program_forward_and_backward(train):
    _, _, hlo = train
    for kernel in ("splash_mqa_fwd", "splash_mqa_dq", "splash_mqa_dkv"):
        assert kernel in hlo


def test_a_policy_on_two_slices_with_every_axis(tmp_path):
    """Sampling on 2 × 16 chips: data crosses the slices, the prefix and the heads are split."""
    mesh = ("--mesh.fsdp", "4", "--mesh.sequence", "2", "--mesh.tensor", "2", "--solver.num-steps", "2")
    done, report = compile_for(
        tmp_path, "--topology", "v5e:4x4", "--slices", "2", "--program", "sample", *mesh
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert report["mesh"] == {"data": 2, "fsdp": 4, "sequence": 2, "tensor": 2} and report["chips"] == 32
    axes = {axis for c in report["collectives"] for axis in c["axes"]}
    assert {"sequence", "tensor"} <= axes
    moved = {dcn: sum(c["bytes"] for c in report["collectives"] if c["dcn"] == dcn) for dcn in (True, False)}
    assert (
        moved[True] < 0.05 * moved[False]
    )  # resharding of a few activations; parameters stay in their slice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh.fsdp", "3"), "3 does not divide the 16 devices"),
        (("--train.batch-size", "24"), "use train.batch_size=32"),
        (("--slices", "2", "--mesh.data", "1", "--mesh.fsdp", "32"), "is not divisible by the 2 slices"),
        (
            ("--program", "sample", "--solver.method", "tsit5"),
            "so nothing can be predicted; compile with a method",
        ),
        (
            ("--program", "sample", "--model.expert.mlp", "320000000", "--solver.num-steps", "1"),
            "GiB too much",
        ),
    ],
)
def test_what_cannot_be_is_one_clear_line(tmp_path, options, message):
    done, _ = compile_for(tmp_path, "--topology", "v5e:4x4", *options)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr and done.stderr.count("\n") == 1
