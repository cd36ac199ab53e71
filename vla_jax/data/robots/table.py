"""Which robots there are, by name or by a JSON file."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla_jax.data.robots import aloha, droid, libero
from vla_jax.data.robots.description import RobotDescription
from vla_jax.data.robots.values import nearest

ROBOTS: Mapping[str, RobotDescription] = {
    robot.name: robot
    for robot in (
        droid.DROID,
        droid.DROID_JOINT_POSITION,
        droid.DROID_FAST,
        aloha.ALOHA,
        aloha.ALOHA_SIM,
        libero.LIBERO,
        libero.LIBERO_RELATIVE,
        libero.LIBERO_FAST,
    )
}

MAX_BYTES = 1_000_000
"""Largest JSON file that is read; a description takes some hundred lines."""


def find_robot(name: str) -> RobotDescription:
    """The robot of that name, or the one that the file ``….json`` describes.

    A file holds the fields of `RobotDescription`; with ``"base": "aloha"`` only those that differ from that robot's.
    Raises ValueError or FileNotFoundError, each in one line.
    """
    if name in ROBOTS:
        return ROBOTS[name]
    path = Path(name)
    if path.suffix != ".json":
        raise ValueError(
            f"robot {name!r} is unknown; {nearest(name, ROBOTS)}, or give a path to a .json file"
        )
    values = _read(path)
    base = values.pop("base", None)
    if base is None:
        return RobotDescription.from_json(values, str(path))
    if not isinstance(base, str) or base not in ROBOTS:
        raise ValueError(f"{path}: base {str(base)[:80]!r} is unknown; {nearest(str(base), ROBOTS)}")
    written = ROBOTS[base].to_json() | {"name": path.stem.replace("-", "_")} | values
    return RobotDescription.from_json(written, str(path))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no description of a robot at {path}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(values, dict):
        fields = ", ".join(field.name for field in dataclasses.fields(RobotDescription))
        raise ValueError(f"{path} holds no map; the fields of a robot are expected: {fields}")
    return values
