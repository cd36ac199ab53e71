"""Functions fit on a screen."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINES = 60


def functions(folder: str) -> dict[str, int]:
    """file::name → lines, of every function and method below a folder."""
    return {
        f"{path.relative_to(ROOT)}::{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_no_function_is_longer_than_a_screen():
    found = functions("vla_jax") | functions("launch") | functions("benchmarks") | functions("configs")
    assert len(found) > 1000
    assert {name: lines for name, lines in found.items() if lines > LINES} == {}
