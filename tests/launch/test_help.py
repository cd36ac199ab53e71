"""Every command says what it is for and what it can be told, and its examples use options that exist."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vla_jax.cli import entry
from vla_jax.cli.command import UsageError, run

FOLDER = Path(__file__).parents[2] / "launch"
COMMANDS = sorted(name.replace("-", "_") for name in entry.COMMANDS)


def test_every_command_has_its_launcher():
    """And no launcher does anything itself."""
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(["__init__", *COMMANDS])
    for name in COMMANDS:
        launcher = importlib.import_module(f"launch.{name}")
        assert launcher.main is importlib.import_module(f"vla_jax.cli.{name}").main
        assert launcher.run is run and len(Path(launcher.__file__).read_text().splitlines()) == 7


def help_of(main, argv, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which the command compile sets unless it is set
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    said = capsys.readouterr()
    assert said.err == ""
    return " ".join(said.out.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, monkeypatch, capsys):
    module = importlib.import_module(f"vla_jax.cli.{name}")
    started = [str(FOLDER / f"{name}.py"), "--help"]
    text = help_of(lambda: run(module.main), started, monkeypatch, capsys)
    assert f"usage: python -m launch.{name} " in text
    assert " ".join(module.__doc__.split("\n\n")[0].split()) in text
    options = set(re.findall(r"--[a-z][\w.-]*", text.split(" options ", 1)[1]))
    own = re.findall(rf"^python -m launch\.{name}\b((?:.*\\\n)*.*)", module.__doc__, re.M)
    asked = {option.replace("_", "-") for command in own for option in re.findall(r"--[a-z][\w.-]*", command)}
    assert own and asked <= options


def test_help_of_the_installed_program_shows_its_own_commands(monkeypatch, capsys):
    text = help_of(entry.main, ["/bin/vla-jax", "train_fast", "--help"], monkeypatch, capsys)
    assert "usage: vla-jax train-fast " in text and "vla-jax train-fast --config" in text
    assert "launch." not in text.split(" options ")[0]


def test_the_installed_program_lists_its_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/vla-jax"])
    entry.main()
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in entry.COMMANDS)


def test_a_reader_of_the_list_may_leave():
    """``vla-jax | head -1``: no error of ours."""
    code = "from vla_jax.cli.entry import main; main()"
    end, other = os.pipe()
    os.close(end)
    with os.fdopen(other, "w") as out:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, cwd=FOLDER.parent
        )
    assert done.returncode == 0 and done.stderr == b""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("trian", "--config", "x"), "error: unknown command 'trian'; did you mean train?\n"),
        (("--config", "x"), "error: unknown command '--config'; there are collect, train, "),
        (("train", "--run-dir", "x", "--config", "tabeltop"), "there is no config tabeltop; did you mean tabletop?"),
        (("evaluate", "--checkpoint", "x", "--episodse", "4"), "unknown option --episodse; did you mean --episodes?\n"),
        (("sweep", "--out", "x"), "error: --config FILE is needed; there are fine_tune, "),
    ],
)  # fmt: skip
def test_the_installed_program_refuses_in_one_line(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/vla-jax", *argv])
    with pytest.raises(SystemExit) as stop:
        entry.main()
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and message in said.err and said.err.count("\n") == 1


def test_errors_name_the_commands_that_can_be_typed(monkeypatch, capsys):
    def refuse():
        raise UsageError("make one with python -m launch.collect --out x; launch.train_fast is another")

    for started, said in (
        ("launch/train.py", "make one with python -m launch.collect --out x; launch.train_fast is another"),
        ("vla-jax train", "make one with vla-jax collect --out x; vla-jax train-fast is another"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        with pytest.raises(SystemExit):
            run(refuse)
        assert capsys.readouterr().err == f"error: {said}\n"
