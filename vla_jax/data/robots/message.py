"""What a robot sends, entry by entry, as images, state and instruction under the names that its description gives them.

Everything is checked here that a description says: which entries there are, how many numbers each has, where an image's
channels are and what its numbers mean. Sizes of images are whoever's who resizes them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from vla_jax.data.fields import kind
from vla_jax.data.robots.description import Camera, RobotDescription
from vla_jax.data.robots.values import nearest


class Message(NamedTuple):
    """One robot's observation."""

    images: dict[str, UInt8[np.ndarray, "h w 3"] | None]
    """By the robot's camera; None: it has none now."""
    state: Float[np.ndarray, " q"]
    instruction: Any
    """As it came; None: the message has none."""


def entries(robot: RobotDescription) -> dict[str, int]:
    """Entries that hold state, and how many numbers each has: up to where its last part ends."""
    sizes: dict[str, int] = {}
    for part in robot.state:
        sizes[part.key] = max(sizes.get(part.key, 0), part.start + part.dims)
    return sizes


def read_message(robot: RobotDescription, message: Mapping[str, Any]) -> Message:
    """A message whose nested names are joined by "/". Raises ValueError in one line that names the entry."""
    sizes = entries(robot)
    cameras = {camera.source: camera for camera in robot.cameras}
    known = [*cameras, *sizes, *robot.instruction, *robot.unused]
    for key in message:
        if key not in known:
            raise ValueError(f"unknown key {key[:80]!r}; {nearest(key, known)}")
    required = [*(key for key, camera in cameras.items() if camera.required), *sizes]
    for key in required:
        if key not in message:
            raise ValueError(f"{key} is missing; {robot.name} sends {', '.join(required)}")
    images = {camera.name: _image(key, camera, message.get(key)) for key, camera in cameras.items()}
    numbers = {key: _numbers(key, message[key], size) for key, size in sizes.items()}
    state = [numbers[part.key][part.start : part.start + part.dims] for part in robot.state]
    said = [message[key] for key in robot.instruction if key in message]
    return Message(images, np.concatenate(state), said[0] if said else None)


def _image(key: str, camera: Camera, value: Any) -> UInt8[np.ndarray, "h w 3"] | None:
    if value is None:
        return None
    chw = camera.layout == "chw"
    wanted = "channels first, [3, h, w]" if chw else "channels last, [h, w, 3]"
    types = {
        "uint8": "uint8",
        "unit": "floats from 0 to 1",
        "either": "uint8 or floats from 0 to 1",
    }[camera.pixels]
    expected = f"{types} with {wanted} is expected"
    if not isinstance(value, np.ndarray) or value.ndim != 3 or value.shape[0 if chw else 2] != 3:
        raise ValueError(f"{key} is {kind(value)}; {expected}")
    floats = value.dtype.kind == "f"
    if (floats and camera.pixels == "uint8") or not (floats or value.dtype == np.uint8):
        raise ValueError(f"{key} is {kind(value)}; {expected}")
    if not floats and camera.pixels == "unit":
        raise ValueError(f"{key} is {kind(value)}; {expected}")
    image = np.ascontiguousarray(np.moveaxis(value, 0, -1)) if chw else value
    if not floats:
        return image
    if not ((image >= 0) & (image <= 1)).all():
        raise ValueError(f"{key} holds numbers that are not from 0 to 1; {expected}")
    return (255 * image).astype(np.uint8)  # cut, not rounded, as openpi's policies do


def _numbers(key: str, value: Any, size: int) -> Float[np.ndarray, " size"]:
    """An entry of the state; a single number may come without an axis."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    array = np.asarray(value) if number or isinstance(value, np.ndarray) else None
    if array is not None and array.ndim == 0:
        array = array[None]
    if array is None or array.dtype.kind not in "fiu" or array.shape != (size,):
        raise ValueError(
            f"{key} is {kind(value)}; {size} number{'s' * (size != 1)} are expected: float32[{size}]"
        )
    return array
