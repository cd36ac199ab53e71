"""The import contract of docs/architecture.md, read off the syntax trees, and what `import vla_jax` costs."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "finite": set(),
    "types": {"layers"},
    "files": set(),
    "layers": set(),
    "flow": {"types"},
    "models": {"types", "layers"},
    "objectives": {"types", "layers", "flow"},
    "data": {"types", "files"},
    "sharding": {"types"},
    "checkpoint": {"types", "files", "sharding"},
    "config": {"models", "flow", "objectives", "data", "sharding", "train"},
    "train": {
        "types", "layers", "models", "flow", "objectives", "data", "sharding", "checkpoint", "config", "files",
    },
    "aot": {"types", "layers", "models", "flow", "data", "sharding", "config", "train", "serve"},
    "serve": {"types", "files", "layers", "models", "flow", "data", "sharding", "checkpoint", "config"},
    "sim": {"types", "files", "data", "flow", "serve"},
    "toy": {"flow", "models", "sim"},
    "convert": {"types", "layers", "models", "objectives", "data", "sharding", "checkpoint", "config"},
    "lab": {
        "types", "layers", "models", "flow", "objectives", "data", "sharding", "checkpoint", "config", "train",
        "serve", "sim", "files",
    },
}  # fmt: skip
PACKAGES["cli"] = set(PACKAGES)
"""Who may import whom; `finite`, a check of numbers, is everybody's. config and train know each other: config composes
train/config.py, train reads the root."""


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; write it out"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def files() -> list[Path]:
    return sorted((ROOT / "vla_jax").rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_go_one_way(path):
    package = path.relative_to(ROOT / "vla_jax").parts[0].removesuffix(".py")
    for name in imported(path):
        top, *rest = name.split(".")
        assert top not in ("launch", "configs", "tests"), f"{path} imports {name}"
        assert top not in ("tensorflow", "torch", "flow_matching"), f"{path} imports {name}"
        if top == "vla_jax" and rest and package != "__init__" and rest[0] != package:
            assert rest[0] in PACKAGES[package] | {"finite"}, (
                f"{package} may not import {rest[0]} ({path}: {name})"
            )


def modules() -> dict[str, Path]:
    """Dotted name → file, of everything in vla_jax."""
    dotted = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files()}
    return {name.removesuffix(".__init__"): path for name, path in dotted.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A closed path through a graph of module → modules that it imports; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other():
    """Imports in functions and under TYPE_CHECKING count: two modules that need each other are one, or three.

    A package and its own modules may: an `__init__` that offers names of its modules does not stand in their way.
    """
    known, graph = modules(), {}
    for name, path in known.items():
        used = {other for other in imported(path) if other in known and not name.startswith(f"{other}.")}
        graph[name] = used - {name}
    assert len(graph) > 200 and "vla_jax.cli.command" in graph["vla_jax.cli.train"]
    assert circle(graph) == []


def test_a_circle_is_found():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_only_config_modules_know_of_train_in_config():
    """config may import train only for its dataclasses, so that the two do not form a knot."""
    names = {n for n in imported(ROOT / "vla_jax/config.py") if n.startswith("vla_jax.")}
    assert {n for n in names if "train" in n} == {
        "vla_jax.train.config", "vla_jax.train.config.LoopConfig", "vla_jax.train.config.LoraConfig",
        "vla_jax.train.config.OptimConfig",
    }  # fmt: skip


def test_the_package_is_light():
    """`import vla_jax` and reading a whole configuration pull in no heavy library."""
    code = "import vla_jax, vla_jax.config, sys; print(' '.join(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    heavy = {"tensorflow", "torch", "transformers", "tensorflow_datasets", "matplotlib", "mujoco"}
    assert not heavy & set(loaded.stdout.split())
