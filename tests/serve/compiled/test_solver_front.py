"""What benchmarks/solver_front.py concludes and draws, on reports made up by hand."""

import json
import sys

import pytest

from benchmarks import solver_front
from vla_jax.cli import command


def row(solver, steps, ms, error, success):
    return {
        "solver": solver, "num_steps": steps, "nfe": steps, "error": error, "ms_p50": ms, "ms_p95": ms,
        "success": success, "success_ci": [success - 0.1, min(1.0, success + 0.1)],
    }  # fmt: skip


ROWS = [
    row("euler", 1, 1.0, 0.30, 0.90),
    row("euler", 2, 2.0, 0.04, 0.70),
    row("midpoint", 2, 4.0, 0.03, 0.85),
    row("euler", 10, 8.0, 0.01, 0.88),
]


def test_the_fastest_of_the_accurate_and_good_is_recommended():
    def chosen(tolerance, rows=ROWS):
        found = solver_front.recommended(rows, tolerance)
        return found["solver"], found["num_steps"]

    assert chosen(0.5) == ("euler", 1)
    assert chosen(0.05) == ("midpoint", 2)  # euler 2 is accurate, but its interval ends below the best rate
    assert chosen(0.02) == ("euler", 10)
    assert chosen(0.001) == ("euler", 10)  # none is accurate: the most accurate
    assert chosen(0.05, ROWS[:1] + ROWS[3:]) == ("euler", 10)


def test_reports_are_joined_in_one_picture(tmp_path, monkeypatch, capsys):
    files = []
    for name in ("tabletop", "metaworld"):
        report = {
            "name": name, "recommended": {"solver": "euler", "num_steps": 2}, "tolerance": 0.05,
            "episodes": 8, "solvers": ROWS,
        }  # fmt: skip
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(report))
    sizes = []
    for number in (1, 2):
        plot = tmp_path / f"{number}.png"
        argv = ["solver_front.py", "--join", *files[:number], "--plot", plot]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        command.run(solver_front.main)
        sizes.append(int.from_bytes(plot.read_bytes()[20:24]))
    assert sizes[1] == pytest.approx(2 * sizes[0], abs=2)
    monkeypatch.setattr(sys, "argv", ["solver_front.py"])
    with pytest.raises(SystemExit):
        command.run(solver_front.main)
    assert "give one of --checkpoint and --join" in capsys.readouterr().err
