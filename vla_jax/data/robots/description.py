"""What a robot is to a model: where its state, cameras and instruction are, in which units, and what is relative.

    RobotDescription(
        name="mine",
        state=(Part(name="arm", key="observation/joints", dims=6), Part(name="hand", key="observation/hand", dims=1)),
        actions=(Part(name="arm", dims=6, relative_to="arm"), Part(name="hand", dims=1)),
        cameras=(Camera(name="front", key="observation/front"),),
        control_hz=30.0,
    )

Values only. Training and serving read the same description (it is saved with the policy), so they can't differ. A
name in `ROBOTS` or a JSON file of the same fields chooses one (`table.find_robot`). docs/robots.md explains the fields.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from vla_jax.data.robots.conversions import CONVERSIONS
from vla_jax.data.robots.values import from_values, nearest

Field = Literal["state", "actions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Dimensions of the state or the actions that belong together. Model = scale · convert(robot) + offset."""

    name: str
    dims: int
    key: str = ""
    """State: the entry of a message that holds it, nested names joined by "/". Actions are not sent, only returned."""
    start: int = 0
    """The first dimension of that entry which belongs to this part."""
    names: tuple[str, ...] = ()
    """One per dimension; empty: the part's name with a number."""
    convert: str = ""
    """A conversion of `conversions.CONVERSIONS`, for units that are no multiple of one another; empty: none."""
    scale: tuple[float, ...] = ()
    """A factor for each dimension, or one for all; -1 where an axis is turned round. Empty: 1."""
    offset: tuple[float, ...] = ()
    """Added after it; one for each dimension, or one for all. Empty: 0."""
    relative_to: str = ""
    """Actions: the part of the state that is subtracted (both in the model's units), so that the model predicts how far
    the robot is to move from where it is now. Empty: absolute."""
    normalize: bool = True
    """Whether statistics scale these dimensions; False leaves them as they are."""

    def __post_init__(self):
        if not self.name:
            raise ValueError("a part has no name")
        if self.dims < 1 or self.start < 0:
            raise ValueError(
                f"part {self.name}: dims={self.dims}, start={self.start}: dims is at least 1, start at least 0"
            )
        if self.names and (len(self.names) != self.dims or len(set(self.names)) != self.dims):
            raise ValueError(f"part {self.name}: {len(self.names)} names for {self.dims} dims")
        for field in ("scale", "offset"):
            values = getattr(self, field)
            if len(values) not in (0, 1, self.dims):
                raise ValueError(
                    f"part {self.name}: {field} has {len(values)} numbers; give one, or {self.dims}"
                )
            if not all(abs(value) < float("inf") for value in values):
                raise ValueError(f"part {self.name}: {field}={values} holds a number that is not finite")
        if 0 in self.scale:
            raise ValueError(f"part {self.name}: a scale of 0 can't be undone")
        if self.convert and self.convert not in CONVERSIONS:
            raise ValueError(
                f"part {self.name}: convert={self.convert!r}: {nearest(self.convert, CONVERSIONS)}"
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each dimension."""
        one = self.dims == 1
        return self.names or tuple(self.name if one else f"{self.name}_{i}" for i in range(self.dims))

    def each(self, field: Literal["scale", "offset"]) -> tuple[float, ...]:
        """Scale or offset of each dimension."""
        values = getattr(self, field) or ((1.0,) if field == "scale" else (0.0,))
        return tuple(values) * (self.dims // len(values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Camera:
    """One camera of the robot."""

    name: str
    """Its name in observations and in data sets."""
    key: str = ""
    """The entry of a message that holds its image; empty: observation/NAME."""
    fills: str = ""
    """The model's camera that it is; empty: the one of its own name."""
    layout: Literal["hwc", "chw"] = "hwc"
    """Order of the axes in messages."""
    pixels: Literal["uint8", "unit", "either"] = "either"
    """In messages: bytes, floats from 0 to 1, or either, told by the array's type."""
    required: bool = True
    """Whether every message has it; one that may be missing is then an absent camera."""

    def __post_init__(self):
        if not self.name or "/" in self.name:
            raise ValueError(f"{self.name!r} can't be the name of a camera")
        if self.layout not in ("hwc", "chw"):
            raise ValueError(f"camera {self.name}: layout={self.layout!r}: use hwc or chw")
        if self.pixels not in ("uint8", "unit", "either"):
            raise ValueError(f"camera {self.name}: pixels={self.pixels!r}: use uint8, unit or either")

    @property
    def source(self) -> str:
        """`key`, or what stands for an empty one."""
        return self.key or f"observation/{self.name}"

    @property
    def model_camera(self) -> str:
        """`fills`, or what stands for an empty one."""
        return self.fills or self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobotDescription:
    """How a robot's messages name and order cameras, state and actions, and what their numbers mean."""

    name: str
    state: tuple[Part, ...]
    """Joined in this order."""
    actions: tuple[Part, ...]
    """Joined in this order."""
    cameras: tuple[Camera, ...]
    absent: tuple[str, ...] = ()
    """Cameras of the model that this robot has not."""
    absent_as: Literal["masked", "black"] = "masked"
    """What the model gets for them: a masked image, or (as π0-FAST was trained) a black one that counts."""
    instruction: tuple[str, ...] = ("prompt",)
    """Entries of a message that may hold the instruction; the first that is there counts."""
    default_prompt: str = ""
    """The instruction of messages without any; empty: they are refused."""
    unused: tuple[str, ...] = ()
    """Entries of messages that may be there and that nothing reads."""
    control_hz: float = 0.0
    """Actions per second; 0: not said."""
    reset_pose: tuple[float, ...] = ()
    """Where the robot's own program moves its joints before an episode (ALOHA's asks the server); empty: not said."""

    def __post_init__(self):
        if not self.name:
            raise ValueError("the description of a robot has no name")
        for field in ("state", "actions", "cameras"):
            values = [value.name for value in getattr(self, field)]
            if not values or len(set(values)) != len(values):
                raise self._error(f"{field} must have different names, at least one; found {values}")
        for field in ("state", "actions"):
            labels = self.labels(field)
            if len(set(labels)) != len(labels):
                raise self._error(f"two dimensions of {field} have the same name; found {list(labels)}")
        for part in self.state:
            if not part.key or part.relative_to:
                raise self._error(
                    f"state {part.name}: key is needed, relative_to is for actions; found "
                    f"key={part.key!r}, relative_to={part.relative_to!r}"
                )
        dims = {part.name: part.dims for part in self.state}
        for part in self.actions:
            if part.key or part.start:
                raise self._error(f"actions {part.name}: key and start are for the state")
            if part.relative_to and dims.get(part.relative_to) != part.dims:
                found = f"{part.dims} dims relative to {part.relative_to!r}"
                hint = (
                    f"which has {dims[part.relative_to]}"
                    if part.relative_to in dims
                    else nearest(part.relative_to, dims)
                )
                raise self._error(f"actions {part.name}: {found}, {hint}")
        filled = [*self.model_cameras, *self.unused]
        if len(set(filled)) != len(filled):
            raise self._error(f"a camera of the model is filled twice; found {list(self.model_cameras)}")
        if self.absent_as not in ("masked", "black"):
            raise self._error(f"absent_as={self.absent_as!r}: use masked or black")
        if not self.instruction:
            raise self._error("instruction names no entry of a message")
        if not 0 <= self.control_hz < float("inf"):
            raise self._error(f"control_hz={self.control_hz}: must be a finite rate, or 0")

    def _error(self, what: str) -> ValueError:
        return ValueError(f"robot {self.name}: {what}")

    def labels(self, field: Field) -> tuple[str, ...]:
        """Names of all dimensions."""
        return tuple(label for part in getattr(self, field) for label in part.labels)

    @property
    def fills(self) -> dict[str, str]:
        """The model's camera → the robot's."""
        return {camera.model_camera: camera.name for camera in self.cameras}

    @property
    def model_cameras(self) -> tuple[str, ...]:
        """Cameras of a model for this robot: those that it fills, then the absent ones."""
        return (*(camera.model_camera for camera in self.cameras), *self.absent)

    @property
    def relative(self) -> tuple[int, ...]:
        """For each action dimension the state dimension that it is relative to; -1: it is absolute."""
        starts, first = {}, 0
        for part in self.state:
            starts[part.name], first = first, first + part.dims
        return tuple(
            starts[part.relative_to] + i if part.relative_to else -1
            for part in self.actions
            for i in range(part.dims)
        )

    def unscaled(self, field: Field) -> tuple[int, ...]:
        """Dimensions that statistics do not scale."""
        kept = [part.normalize for part in getattr(self, field) for _ in range(part.dims)]
        return tuple(i for i, normalize in enumerate(kept) if not normalize)

    def check_dims(self, state: int, actions: int, what: str) -> None:
        """Raises ValueError unless `what` has this robot's dimensions."""
        found: dict[Field, int] = {"state": state, "actions": actions}
        for field, dims in found.items():
            if dims != len(self.labels(field)):
                raise self._error(
                    f"{len(self.labels(field))} dims of {field} are described, {what} has {dims}"
                )

    def to_json(self) -> dict[str, Any]:
        """The description as JSON values, without what is left to its default."""
        return _written(self)

    @classmethod
    def from_json(cls, values: Any, where: str = "the description of a robot") -> "RobotDescription":
        """The inverse of `to_json`. Raises ValueError in one line; for unknown keys with the nearest known one."""
        return from_values(cls, values, where)


def _written(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: _written(found) for f, found in fields if found != f.default}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_written(inner) for inner in value]
    return value
