"""No number of a configuration is NaN or infinite, wherever it comes from."""

import ast
import dataclasses
import importlib
import json
import math
from pathlib import Path

import pytest

from vla_jax.cli.command import UsageError, cli
from vla_jax.config import TrainConfig, from_json, to_json

ROOT = Path(__file__).parents[1]
EVIL = (math.nan, math.inf, -math.inf)


def configurations():
    """Every dataclass of the project whose name says that a user fills it in, and which has a float."""
    for path in sorted([*(ROOT / "vla_jax").rglob("*.py"), *(ROOT / "launch").glob("*.py")]):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef) or not node.name.endswith(("Config", "Args", "Options")):
                continue
            fields = [f for f in node.body if isinstance(f, ast.AnnAssign)]
            names = [f.target.id for f in fields if _has_float(f.annotation)]
            if names:
                yield pytest.param(path.relative_to(ROOT), node.name, names, id=node.name)


def _has_float(annotation):
    return any(isinstance(node, ast.Name) and node.id == "float" for node in ast.walk(annotation))


@pytest.mark.parametrize(("path", "name", "fields"), [*configurations()])
def test_every_configuration_refuses_them(path, name, fields):
    kind = getattr(importlib.import_module(".".join(path.with_suffix("").parts)), name)
    needed = {
        field.name: "x"
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    for field in fields:
        for value in EVIL:
            for form in (value, (0.5, value)):
                with pytest.raises(ValueError, match=rf"{field}=.*: must be a finite number"):
                    kind(**needed | {field: form})


def test_the_search_finds_what_it_should():
    names = {param.values[1] for param in configurations()}
    assert {"OptimConfig", "WeightingConfig", "TabletopConfig", "ServeArgs", "PolicyOptions"} <= names
    assert len(names) >= 25


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    "option", ["objective.action_weight", "optim.learning_rate", "objective.weighting.decay"]
)
def test_from_the_command_line(option, value):
    with pytest.raises((UsageError, ValueError), match=rf"{option}=-?(nan|inf): must be a finite number"):
        cli(TrainConfig, description=None, argv=[f"--{option}", value])


def test_from_json():
    values = json.loads(to_json(TrainConfig()))
    values["optim"]["clip_norm"] = math.inf
    text = json.dumps(values)
    assert "Infinity" in text
    with pytest.raises(ValueError, match=r"optim\.clip_norm=inf: must be a finite number"):
        from_json(text)
