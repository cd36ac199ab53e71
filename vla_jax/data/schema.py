"""What a data set contains: its cameras, state and action dimensions, and one recorded episode."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vla_jax.finite import finite

#: Fields of an episode's metadata, their type and the value of one that was not given.
METADATA: Mapping[str, tuple[type, Any]] = {
    "seed": (int, None),
    "task": (str, None),
    "success": (bool, None),
    "side": (str, ""),
    "kind": (str, ""),
    "noisy": (bool, False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class DatasetSchema:
    """Names and sizes of everything that is recorded; two data sets of equal schema can be swapped."""

    name: str
    """Name of the data set: lower case letters, digits and underscores (it starts the file names)."""
    robot: str
    """The robot or environment that was recorded."""
    cameras: dict[str, tuple[int, int]]
    """Camera name → (height, width) in pixels."""
    state_names: tuple[str, ...]
    """One name per state dimension, with its unit where it has one."""
    action_names: tuple[str, ...]
    """One name per action dimension."""
    control_hz: float
    """Steps per second."""

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"schema name {self.name!r}: use lower case letters, digits and underscores")
        object.__setattr__(self, "state_names", tuple(self.state_names))
        object.__setattr__(self, "action_names", tuple(self.action_names))
        cameras = {camera: (int(size[0]), int(size[1])) for camera, size in sorted(self.cameras.items())}
        object.__setattr__(self, "cameras", cameras)
        for camera, size in cameras.items():
            if camera == "state" or "/" in camera or not camera:
                raise ValueError(f"schema {self.name}: {camera!r} cannot be the name of a camera")
            if min(size) < 1:
                raise ValueError(f"schema {self.name}: camera {camera} of size {size} has no pixels")
        for field in ("state_names", "action_names"):
            names = getattr(self, field)
            if not names or len(set(names)) != len(names):
                raise ValueError(f"schema {self.name}: {field}={names} must be different names, at least one")
        if self.control_hz <= 0:
            raise ValueError(f"schema {self.name}: control_hz={self.control_hz} must be above 0")

    def to_json(self) -> dict[str, Any]:
        """The schema as JSON values."""
        return {
            **dataclasses.asdict(self),
            "cameras": {camera: list(size) for camera, size in self.cameras.items()},
            "state_names": list(self.state_names),
            "action_names": list(self.action_names),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DatasetSchema":
        """The inverse of `to_json`."""
        return cls(**values)

    def difference(self, other: "DatasetSchema") -> str:
        """What differs between two schemas, in words; empty when they are equal."""
        found = []
        for field in ("name", "robot", "control_hz"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                found.append(f"{field} {mine!r} against {theirs!r}")
        for camera in sorted({*self.cameras, *other.cameras}):
            mine, theirs = self.cameras.get(camera), other.cameras.get(camera)
            if mine != theirs:
                found.append(f"camera {camera} {mine or 'absent'} against {theirs or 'absent'}")
        for field in ("state_names", "action_names"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                kind = field.removesuffix("_names")
                found.append(
                    f"{kind} {len(mine)} dims {list(mine)} against {len(theirs)} dims {list(theirs)}"
                )
        return "; ".join(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration: T observations, and the action taken at each (letter T for its length)."""

    images: dict[str, UInt8[np.ndarray, "T h w 3"]]
    """Camera → frames."""
    state: Float[np.ndarray, "T q"]
    """Proprioception in the robot's units."""
    action: Float[np.ndarray, "T a"]
    """Commands in the robot's units."""
    language_instruction: str
    """What the robot was told to do."""
    text_target: str | tuple[str, ...]
    """The text to be predicted (a plan), one for the episode or one per step; empty: none."""
    metadata: dict[str, Any]
    """seed, task, success; optionally side, kind (strings) and noisy (see `METADATA`)."""

    def __len__(self) -> int:
        return len(self.state)

    def check(self, schema: DatasetSchema) -> None:
        """Raise a ValueError that names the first feature which is not what the schema says."""
        length = len(self.state)
        if length == 0:
            raise ValueError("episode without steps")
        expected = {
            "state": (length, len(schema.state_names)),
            "action": (length, len(schema.action_names)),
            **{f"image {camera}": (length, *size, 3) for camera, size in schema.cameras.items()},
        }
        found = {"state": self.state, "action": self.action}
        found |= {f"image {camera}": frames for camera, frames in self.images.items()}
        if expected.keys() != found.keys():
            raise ValueError(f"episode has {sorted(found)}, the schema {schema.name} has {sorted(expected)}")
        for feature, shape in expected.items():
            dtype = np.uint8 if feature.startswith("image ") else np.float32
            value = found[feature]
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(
                    f"episode {feature}: {value.dtype}{list(value.shape)}, the schema {schema.name} says "
                    f"{np.dtype(dtype)}{list(shape)}"
                )
        if not isinstance(self.text_target, str) and len(self.text_target) != length:
            raise ValueError(f"episode of {length} steps has {len(self.text_target)} text targets")
        for key, value in self.metadata.items():
            if key not in METADATA:
                raise ValueError(f"episode metadata {key!r}: unknown, use one of {sorted(METADATA)}")
            allowed = (int, np.integer) if METADATA[key][0] is int else (METADATA[key][0], np.bool_)
            if not isinstance(value, allowed):
                raise ValueError(f"episode metadata {key}={value!r}: must be {METADATA[key][0].__name__}")
        missing = [
            key for key, (_, default) in METADATA.items() if default is None and key not in self.metadata
        ]
        if missing:
            raise ValueError(f"episode metadata lacks {missing}")
