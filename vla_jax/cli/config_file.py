"""Configurations are Python files with a function `get_config()`. They are found here by path or by name, and read.

A name is a path below a folder `configs`, without the ending: ``tabletop`` is ``configs/tabletop.py`` and
``images/shapes`` is ``configs/images/shapes.py``. The folder of the working directory comes first, so that a project
of one's own can have its own; then the one that vla_jax brings along, whatever the working directory is.
"""

import difflib
import importlib.util
from pathlib import Path
from typing import Any

HELP = "Python file with get_config(), or its name: tabletop is configs/tabletop.py."
"""What the option ``--config`` is."""


def load_config(path: str | Path) -> Any:
    """What `get_config()` of a file, or of a named configuration, returns; raises FileNotFoundError, ValueError."""
    path = find_config(path)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, NameError, TypeError, ImportError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if "get_config" not in vars(module):
        raise ValueError(f"{path} has no get_config()")
    return module.get_config()


def find_config(path: str | Path) -> Path:
    """The file; raises FileNotFoundError with the nearest name, or all names."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.suffix and not path.is_absolute():
        for folder in _folders():
            named = folder / path.with_suffix(".py")
            if named.is_file():
                return named
    below = path.parts[1] + "/" if len(path.parts) > 2 and path.parts[0] == "configs" else ""
    names = known_configs()
    near = difflib.get_close_matches(below + path.stem, names, n=1, cutoff=0.8)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise FileNotFoundError(f"there is no config {path}; {hint}")


def known_configs(below: str = "") -> list[str]:
    """The names of all configurations in a folder of `configs`, e.g. ``images``; those of policies lie in none."""
    files = {
        (Path(below) / path.stem).as_posix()
        for folder in _folders()
        for path in (folder / below).glob("*.py")
    }
    return sorted(name for name in files if not name.rpartition("/")[2].startswith("_"))


def _folders() -> tuple[Path, Path]:
    """Where names are looked up, in this order."""
    package = Path(__file__).parents[1]
    installed = package / "configs"  # of a wheel; in a checkout the folder lies beside the package
    return Path("configs"), installed if installed.is_dir() else package.parent / "configs"
