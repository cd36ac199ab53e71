"""Small JSON files that a command leaves for its next start, and what to do where one is damaged."""

import json
import os
import pathlib
import sys
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath

AnyPath = pathlib.Path | epath.Path


class DamagedFileError(ValueError):
    """A file that is not what was written."""


def read_json(path: AnyPath, keys: Collection[str] = (), mend: str = "") -> dict[str, Any]:
    """A JSON object with at least these keys.

    Raises FileNotFoundError, and DamagedFileError, one line that ends with how to `mend` it.
    """
    ending = f"; {mend}" if mend else ""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        why = "not JSON" if path.read_bytes() else "it is empty"
        raise DamagedFileError(f"{path} is damaged ({why}){ending}") from None
    if not isinstance(found, dict):
        raise DamagedFileError(f"{path} is damaged (not a JSON object){ending}")
    missing = [key for key in keys if key not in found]
    if missing:
        raise DamagedFileError(f"{path} is damaged (it lacks {', '.join(missing)}){ending}")
    return found


def write_json(values: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes a JSON object in one move, so that it is whole or not there."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(values, indent=2) + "\n")
    part.replace(path)


def read_lines(path: AnyPath) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file with a ``step`` each. A damaged line is left out, with a warning.

    Raises FileNotFoundError.
    """
    kept, damaged = [], []
    for number, _, values in json_lines(path):
        if values is None:
            damaged.append(number)
        else:
            kept.append(values)
    if damaged:
        warn(f"{path}: {name_lines(damaged)} damaged and left out")
    return kept


def json_lines(path: AnyPath) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Number, bytes and object of each line; None where a line is no object with a step, or does not end."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            values = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            values = None
        good = isinstance(values, dict) and type(values.get("step")) is int
        yield number, line, values if good else None


def name_lines(numbers: list[int]) -> str:
    """``line 3 is``, ``lines 3, 5 are``."""
    if len(numbers) == 1:
        return f"line {numbers[0]} is"
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"lines {', '.join(map(str, numbers[:5]))}{more} are"


def set_aside(path: AnyPath) -> AnyPath:
    """Renames a damaged file so that a new one can be begun; an earlier one under that name is replaced."""
    return path.replace(path.with_name(f"{path.name}.damaged"))


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
