"""Which checkpoints there are, and reading of the newest one that is whole.

Where a trainer goes on saving and deleting, "the newest" is another one at every look. So it is looked for once, and
all that is wanted is read from what was found; where that was deleted meanwhile, it is looked for again.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable
from typing import TypeVar

import orbax.checkpoint as ocp

from vla_jax.checkpoint.failures import CorruptCheckpointError, UnreachableCheckpointError
from vla_jax.checkpoint.manifest import read_manifest
from vla_jax.checkpoint.paths import Path, run_path

T = TypeVar("T")

#: The folder of checkpoints inside a run's directory.
FOLDER = "checkpoints"


def newest(path: str | os.PathLike, read: Callable[[Path], T]) -> T:
    """`read(folder)` of the newest step for which it does not raise CorruptCheckpointError.

    What is passed over is warned of, once `read` has succeeded. Raises FileNotFoundError where there is no checkpoint,
    ValueError where none is whole, and UnreachableCheckpointError.
    """
    damaged: dict[Path, CorruptCheckpointError] = {}
    while True:
        candidates = locate(run_path(path))
        step_dir = next((one for one in candidates if one not in damaged), None)
        if step_dir is None:
            first = next(one for one in candidates if one in damaged)
            raise ValueError(f"checkpoint {first} is unreadable ({damaged[first]})") from damaged[first]
        try:
            result = read(step_dir)
        except CorruptCheckpointError as error:
            if is_whole(step_dir):
                damaged[step_dir] = error
            continue
        except UnreachableCheckpointError:
            if is_whole(step_dir):
                raise
            continue
        for passed in candidates[: candidates.index(step_dir)]:
            print(
                f"warning: checkpoint {passed} is unreadable ({damaged[passed]}); using step "
                f"{number(step_dir)}",
                file=sys.stderr,
            )
        return result


def locate(path: Path) -> list[Path]:
    """The steps that `path` stands for, newest first; raises FileNotFoundError where there is none."""
    if (path / "meta").is_dir():
        return [path]
    for folder in (path / FOLDER, path):
        steps = whole_steps(folder) if folder.is_dir() else []
        if steps:
            return [folder / str(step) for step in reversed(steps)]
    raise FileNotFoundError(f"no checkpoint in {path}: give a run's directory, or one of its {FOLDER}/<step>")


def whole_steps(folder: Path) -> list[int]:
    """Names of the steps in a folder of checkpoints that were written to the end, in the order of the steps."""
    names = [int(child.name) for child in folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", child.name)]
    whole = [name for name in names if is_whole(folder / str(name))]
    return sorted(whole, key=lambda name: (number(folder / str(name)), name))


def number(step_dir: Path) -> int:
    """The step that a folder holds, as it says itself; else its name, -1 where that is no number."""
    with contextlib.suppress(ValueError, OSError):
        manifest = read_manifest(step_dir)
        if manifest is not None:
            return manifest.step
    return int(step_dir.name) if re.fullmatch("[0-9]+", step_dir.name) else -1


def is_whole(step_dir: Path) -> bool:
    """Whether a step is there, and was written to the end."""
    try:
        return step_dir.is_dir() and ocp.utils.is_checkpoint_finalized(step_dir)
    except (ValueError, FileNotFoundError):  # deleted between the two questions
        if step_dir.exists():
            raise
        return False
