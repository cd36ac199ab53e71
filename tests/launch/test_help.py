"""Every launcher says what it is for and what it can be told, and its examples use options that exist."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from launch._main import run

FOLDER = Path(__file__).parents[2] / "launch"
LAUNCHERS = sorted(p.stem for p in FOLDER.glob("*.py") if "\n    run(main)\n" in p.read_text())


def test_all_launchers_are_found():
    others = {path.stem for path in FOLDER.glob("[!_]*.py")} - set(LAUNCHERS)
    assert others == set() and {"train", "evaluate", "quickstart", "compile"} <= set(LAUNCHERS)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help(name, monkeypatch, capsys):
    module = importlib.import_module(f"launch.{name}")
    monkeypatch.setattr(sys, "argv", [module.__file__, "--help"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which launch.compile sets unless it is set
    with pytest.raises(SystemExit) as stop:
        run(module.main)
    assert not stop.value.code
    said = capsys.readouterr()
    assert said.err == ""
    text = " ".join(said.out.split())
    assert f"usage: python -m launch.{name} " in text
    assert " ".join(module.__doc__.split("\n\n")[0].split()) in text
    options = set(re.findall(r"--[a-z][\w.-]*", text.split(" options ", 1)[1]))
    own = re.findall(rf"^python -m launch\.{name}\b((?:.*\\\n)*.*)", module.__doc__, re.M)
    asked = {option.replace("_", "-") for command in own for option in re.findall(r"--[a-z][\w.-]*", command)}
    assert own and asked <= options
