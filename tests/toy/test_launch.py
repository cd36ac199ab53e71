"""launch.toy: every law and process, the report, the pictures, what it refuses."""

import json
import sys

import pytest

from vla_jax.cli import command
from vla_jax.cli import toy as launcher

QUICK = ("--steps", "3", "--batch-size", "16", "--width", "8", "--depth", "1")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The measures of a launch on few points."""
    from vla_jax.toy import measure

    monkeypatch.setattr(launcher, "STEPS", dict.fromkeys(launcher.STEPS, (1, 2)))
    smaller = {
        "nll": {"n": 32, "steps": 2},
        "quality": {"n": 64},
        "guidance": {"n": 4, "scales": (1, 2)},
        "time_error": {"n": 32},
        "sampling_noise": {"n": 64},
    }
    for name, value in smaller.items():
        original = getattr(measure, name)
        monkeypatch.setattr(
            measure, name, lambda *a, original=original, value=value, **k: original(*a, **(k | value))
        )


def launch(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["toy", *map(str, argv)])
    command.run(launcher.main)


def test_report_and_pictures(tmp_path, monkeypatch, capsys):
    launch(monkeypatch, "--data", "gmm", "--conditional", "--seeds", 2, *QUICK, "--json", tmp_path / "r.json",
           "--figures", tmp_path / "f")  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    assert {"nll", "in_support", "energy_distance", "nfe", "entropy"} <= set(report)
    assert report["nfe"] == 40 and len(report["seeds"]) == 2
    assert report["nll"] == pytest.approx(sum(row["nll"] for row in report["seeds"]) / 2)
    assert [q["nfe"] for q in report["error_against_n"]["midpoint"]] == [2, 4]
    assert report["field_error"].keys() == {"0.1", "0.5", "0.9"}
    assert report["guidance"]["w"] == [1, 2]
    assert {path.name for path in (tmp_path / "f").iterdir()} == {
        "samples.png", "trajectories.png", "field.png", "errors.png", "guidance.png",
    }  # fmt: skip
    assert "| mean |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "data, process, nfe", [("ring", "ddpm", 50), ("moons", "score", 50), ("checkerboard", "meanflow", 1)]
)
def test_every_process(data, process, nfe, tmp_path, monkeypatch):
    launch(monkeypatch, "--data", data, "--process", process, *QUICK, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["nfe"] == nfe and report["config"]["process"] == process


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--data", "ring", "--conditional"), "ring has no classes"),
        (("--method", "ancestral"), "samples a ddpm process"),
        (("--process", "meanflow", "--method", "heun"), "meanflow jumps"),
        (("--stepz", "3"), "did you mean --steps"),
        (("--seeds", "0"), "at least 1"),
    ],
)
def test_refusals(argv, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        launch(monkeypatch, *argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err
