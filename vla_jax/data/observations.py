"""What a policy takes for an observation, as a whole: cameras by name, and as many rows of everything as robots.

Every camera of the model is given, or named as absent with None: one that is forgotten would be a masked, black image
that nobody asked for. Cameras of the data set that the model was not trained to see may be there; they are left out.
"""

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from vla_jax.data.fields import check_image, check_state, check_text, kind
from vla_jax.types import Observation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """The names that an observation is checked against."""

    cameras: tuple[str, ...]
    """Those that the model sees."""
    unseen: tuple[str, ...] = ()
    """Further ones of the robot, which may be there and are left out."""
    state_names: tuple[str, ...]


def check_observation(observation: Any, expected: Expected | None = None) -> Observation:
    """The observation with NumPy arrays of the right types, or one ValueError in one line.

    Without `expected` (an executor need not know its policy's robot) only what holds for every robot is checked.
    Absent cameras stay None. Arrays are shared with what was given, see `owned`.
    """
    if not isinstance(observation, Observation):
        raise ValueError(
            f"the observation is {kind(observation)}; an Observation is expected: vla_jax.types.Observation("
            "images={camera: uint8[b, h, w, 3]}, state=float32[b, q], instruction=(text, …))"
        )
    instruction = check_texts("instruction", observation.instruction)
    robots = len(instruction)
    if robots == 0:
        raise ValueError("instruction is empty; one text for each robot is expected, at least one")
    if not isinstance(observation.images, Mapping):
        raise ValueError(
            f"images is {kind(observation.images)}; a map from camera to uint8[{robots}, h, w, 3] is expected: "
            "images={camera: …}"
        )
    images = {
        camera: None if image is None else check_image(f"images[{camera!r}]", image, robots=robots)
        for camera, image in _cameras(observation.images, expected).items()
    }
    blind = expected is not None and not expected.cameras
    if not blind and all(image is None for image in images.values()):
        raise ValueError("images holds no image; at least one camera is needed: give one")
    dims = None if expected is None else len(expected.state_names)
    state = check_state("state", observation.state, dims, robots=robots)
    return Observation(images=images, state=state, instruction=instruction)


def check_texts(field: str, texts: Any, robots: int | None = None) -> tuple[str, ...]:
    """One text per robot. Raises ValueError."""
    if isinstance(texts, str) or not isinstance(texts, (Sequence, np.ndarray)):
        mend = f": {field}=(text,) for one robot" if isinstance(texts, str) else ""
        raise ValueError(f"{field} is {kind(texts)}; a tuple with one text for each robot is expected{mend}")
    if robots is not None and len(texts) != robots:
        raise ValueError(f"{len(texts)} {field}s for {robots} robots: give one for each")
    return tuple(check_text(f"{field}[{row}]", text) for row, text in enumerate(texts))


def check_names(given: Collection[Any], known: Collection[str], what: str) -> None:
    """Raises ValueError for the first unknown name, with the nearest known one."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name)[:80], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"unknown {what} {str(name)[:80]!r}; {hint}")


def _cameras(images: Mapping[str, Any], expected: Expected | None) -> dict[str, Any]:
    """Those that the model sees, in its order; all of them where nothing is expected."""
    if expected is None:
        return dict(images)
    check_names(images, (*expected.cameras, *expected.unseen), "camera")
    for camera in expected.cameras:
        if camera not in images:
            raise ValueError(
                f"images[{camera!r}] is missing; the policy sees {', '.join(expected.cameras)}: give its image, or "
                "None where the robot has no such camera now"
            )
    return {camera: images[camera] for camera in expected.cameras}


def seen(observation: Observation, camera: str) -> UInt8[np.ndarray, "b h w 3"]:
    """The images of a camera that is there."""
    images = observation.images[camera]
    if images is None:
        raise ValueError(f"camera {camera} has no image now")
    return images


def take(observation: Observation, rows: Sequence[int] | Int[np.ndarray, " r"]) -> Observation:
    """The observations of some robots, as copies."""
    return Observation(
        images={
            name: None if image is None else image[np.asarray(rows)]
            for name, image in observation.images.items()
        },
        state=observation.state[np.asarray(rows)],
        instruction=tuple(observation.instruction[row] for row in rows),
    )


def owned(observation: Observation) -> Observation:
    """A copy that stays what it is when the robot's buffers are filled anew: for what outlives the call."""
    return take(observation, range(len(observation.instruction)))
