"""No call in the library or its launchers turns what was read into code (docs/security.md); a new one fails here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "vla_jax").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])

RUNS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "import_module",
    "exec_module",
    "runpy.run_path",
    "runpy.run_module",
    "builder_from_directory",
    "builder_from_directories",
    "builder_from_files",
    "from_config",
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "Unpickler",
    "cloudpickle.loads",
    "joblib.load",
    "np.load",
    "yaml.load",
    "unsafe_load",
    "from_pretrained",
}
ALLOWED = {
    "vla_jax/cli/config_file.py": {"exec_module"},  # --config: a configuration is a Python file, by design
    "vla_jax/cli/entry.py": {"import_module"},  # of the table of commands
    "vla_jax/sim/metaworld/headless.py": {"import_module"},  # of a table of modules of mujoco's
}


def calls(tree):
    """Names of everything that is called: `f`, `f` of `x.f`, and `x.f`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id
            elif isinstance(node.func, ast.Attribute):
                above = node.func.value
                if node.func.attr != "compile":
                    yield node.func.attr
                if isinstance(above, ast.Name):
                    yield f"{above.id}.{node.func.attr}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_call_runs_what_was_read(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    allowed = ALLOWED.get(file.relative_to(ROOT).as_posix(), set())
    assert set(calls(tree)) & RUNS <= allowed
    words = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    assert not words & {"trust_remote_code", "allow_pickle"}


def test_the_scan_finds_such_calls():
    text = "import pickle\npickle.load(f)\neval(x)\ntfds.builder_from_directory(p)\nlowered.compile()\n"
    assert set(calls(ast.parse(text))) & RUNS == {"pickle.load", "eval", "builder_from_directory"}
