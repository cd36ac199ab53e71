"""launch.evaluate, launch.sample and launch.quickstart on an untrained policy."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from tests.serve import toy
from vla_jax.cli import command, evaluate, quickstart, sample

KEYS = {
    "episodes", "success", "success_ci", "collision", "path_error", "chunk_diversity", "latency_ms_p50",
    "latency_ms_p95", "swapped_success", "plan_accuracy", "per_task", "config", "solver", "seed", "step", "details",
}  # fmt: skip
# An untrained policy may succeed nowhere, pass on neither side, or see no symmetric scene in four.
MAY_BE_ABSENT = {"left_share", "forced_plan_followed", "path_length_m", "time_s"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("flow", "regression"):
        toy.save(folder / kind, dataclasses.replace(toy.config(kind), execute=3))
        lines = [{"step": s, "action_loss": 1 / s, "text_loss": 2 / s} for s in range(1, 20)]
        (folder / kind / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def launch(monkeypatch, module, *argv) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
    command.run(module.main)


def refused(monkeypatch, capsys, module, *argv) -> str:
    """The one line on stderr with which a launcher refuses."""
    with pytest.raises(SystemExit) as stop:
        launch(monkeypatch, module, *argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def test_evaluate_prints_a_table_and_writes_report_and_pictures(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.json"
    launch(
        monkeypatch, evaluate, "--checkpoint", runs / "flow", "--episodes", 4, "--num-steps", 2,
        "--json", out, "--figures", tmp_path / "figures",
    )  # fmt: skip
    report = json.loads(out.read_text())
    assert KEYS <= set(report) <= KEYS | MAY_BE_ABSENT
    assert (report["episodes"], report["step"], report["solver"]["num_steps"]) == (4, 7, 2)
    assert report["config"]["env"] == "tabletop" and report["config"]["execute"] == 3  # the configuration's
    printed = capsys.readouterr().out
    assert "| success" in printed and "latency of a chunk, median" in printed
    pictures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert pictures == ["curves.png", "fan.png", "rollouts.png"]


def test_sample_draws_policies_side_by_side(runs, tmp_path, monkeypatch, capsys):
    launch(
        monkeypatch, sample, "--checkpoint", runs / "flow", runs / "regression", "--scenes", 1, "--samples", 4,
        "--out", tmp_path / "fan.png",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "flow: “" in printed and "regression: “" in printed and "diversity 0.00" in printed
    assert (tmp_path / "fan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--checkpoint", "nowhere"), "nowhere: give a run's directory"),
        (("--env", "kitchen"), "'kitchen' is unknown; use tabletop or metaworld"),
        (("--env", "metaworld:reach-v3"), "was trained for tabletop"),
        (("--episodes", "0"), "episodes=0"),
        (("--execute", "9"), "use --execute 8 or less"),
        (("--execute", "2", "--delay", "3", "--executor", "async"), "use --execute 3 or more"),
        (("--guidance", "2"), "prompt_dropout=0"),
        (("--num-steps", "0"), "num_steps 0"),
        (("--temperature", "1"), "add --plan-visible"),
        (("--overlap", "2"), "overlap=2 does nothing with executor receding"),
        (("--solver", "magic"), "magic"),
        (("--episodse", "4"), "did you mean --episodes?"),
        (("--batch-size", "0"), "batch_size=0"),
    ],
)
def test_evaluate_refuses_in_one_line(runs, monkeypatch, capsys, argv, message):
    checkpoint = () if argv[0] == "--checkpoint" else ("--checkpoint", runs / "flow")
    assert message in refused(monkeypatch, capsys, evaluate, *checkpoint, *argv)


def test_a_solver_does_not_apply_to_regression(runs, monkeypatch, capsys):
    line = refused(monkeypatch, capsys, evaluate, "--checkpoint", runs / "regression", "--num-steps", 3)
    assert "no solver" in line


def test_sample_refuses_the_same_policy_twice(runs, monkeypatch, capsys):
    same = (runs / "flow",) * 3
    assert "given twice" in refused(monkeypatch, capsys, sample, "--checkpoint", *same)


def test_quickstart_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Stages that write a line each; the second one fails until it is mended."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = (
        "import sys, os\nopen('{log}', 'a').write('{name}\\n')\nsys.exit(os.path.exists('{bad}') * {fails})\n"
    )
    log, bad = tmp_path / "log", tmp_path / "bad"
    bad.touch()
    for name in ("first", "second"):
        fails = int(name == "second")
        (tmp_path / f"stage_{name}.py").write_text(code.format(log=log, name=name, bad=bad, fails=fails))
    stages = [quickstart.Stage(name, f"stage_{name}", ("--x", "1")) for name in ("first", "second")]
    monkeypatch.setattr(quickstart, "program", lambda command: [sys.executable, "-m", command])
    monkeypatch.setattr(quickstart, "stages", lambda args: stages)
    monkeypatch.setattr(quickstart, "write_results", lambda out: "the table")
    argv = ("--out", tmp_path / "out", "--config", toy.__file__)
    assert "'second' failed" in refused(monkeypatch, capsys, quickstart, *argv)
    bad.unlink()
    launch(monkeypatch, quickstart, *argv)
    assert log.read_text().split() == ["first", "second", "second"]
    assert "the table" in capsys.readouterr().out
    stages[0] = quickstart.Stage("first", "stage_first", ("--x", "2"))
    launch(monkeypatch, quickstart, *argv)
    assert log.read_text().split() == ["first", "second", "second", "first"]


def test_quickstart_stages_are_commands_that_parse(monkeypatch):
    """Every option of every stage is one that its launcher knows."""
    from vla_jax.cli.train import TrainArgs
    from vla_jax.sim.collect import CollectConfig

    kinds = {
        "collect": CollectConfig,
        "evaluate": evaluate.EvaluateArgs,
        "sample": sample.SampleArgs,
    }
    for fast in (False, True):
        for stage in quickstart.stages(quickstart.QuickstartArgs(fast=fast)):
            if stage.command == "train":
                args, config = command.cli_with_config(TrainArgs, description="", argv=list(stage.options))
                assert config.process.kind == Path(args.run_dir).name
            else:
                command.cli(kinds[stage.command], description="", argv=list(stage.options))
