"""What a served policy expects and gives: the server's first frame, and what requests are checked against."""

import dataclasses
from typing import Any

import numpy as np

from vla_jax.data.robots.description import RobotDescription
from vla_jax.data.robots.message import entries

STATE, PROMPT, OPTIONS, BATCH = "observation/state", "prompt", "options", "batch"
"""Keys of a request besides its cameras'. An observation has a state and a prompt; options are our extension, and so
is a batch (a list of requests)."""


def camera_key(camera: str) -> str:
    """The key of a camera's image."""
    return f"observation/{camera}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Shapes, and what may be asked for."""

    cameras: dict[str, tuple[int, int]]
    """Camera → (height, width) of its uint8 RGB image, as trained on."""
    max_pixels: int = 0
    """Images of other sizes, of up to so many pixels, are resized as in training; 0: they are refused."""
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    horizon: int
    """k, the actions of a chunk."""
    control_hz: float
    samples: tuple[int, ...] = (1,)
    """How many chunks a request may ask for."""
    writes_plans: bool = False
    sees_plans: bool = False
    guides: bool = False
    """Whether the instruction can be given a weight."""
    max_rows: int = 16
    """Observations in one request."""
    robot: RobotDescription | None = None
    """Which entries a request has instead of ours, and what they mean."""
    default_prompt: str = ""
    """The instruction of a request without one; empty: it is refused."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further entries of the metadata: configuration hash, step, solver, …"""

    def key_of(self, camera: str) -> str:
        """The entry of a request that holds a camera's image."""
        if self.robot is None:
            return camera_key(camera)
        return next(c.source for c in self.robot.cameras if c.name == camera)

    @property
    def options(self) -> tuple[str, ...]:
        """The options that this policy offers."""
        offered = ["seed", "samples", "deadline_ms", *["guidance"] * self.guides]
        offered += ["write_plan"] * self.writes_plans + ["plan"] * self.sees_plans
        return (*offered, *["plan_visible"] * (self.sees_plans and self.writes_plans))

    @property
    def row_bytes(self) -> int:
        """The largest honest observation: images, a float64 state, texts and the frame around them."""
        images = [3 * height * width for height, width in self.cameras.values()]
        if self.robot is not None:
            floats = any(camera.pixels != "uint8" for camera in self.robot.cameras)
            # What may be sent and is not read is taken for further images.
            images = [
                (4 if floats else 1) * size for size in (*images, *[max(images)] * len(self.robot.unused))
            ]
        images = sum(images)
        return images + 8 * len(self.state_names) + 16_384

    @property
    def max_bytes(self) -> int:
        """The largest message that is read; a larger one closes its connection (1009).

        It holds as many rows as there may be with images of the size trained on, or one row with the largest images.
        """
        native = [height * width for height, width in self.cameras.values()]
        native += [max(native)] * len(self.robot.unused if self.robot else ())
        larger = sum(3 * max(0, self.max_pixels - pixels) for pixels in native)
        return max(self.max_rows * self.row_bytes, self.row_bytes + larger) + 4096

    def takes(self, size: tuple[int, int], camera: str) -> bool:
        """Whether an image of this height and width is taken, resized where needed."""
        return size == self.cameras[camera] or size[0] * size[1] <= self.max_pixels

    def metadata(self) -> dict[str, Any]:
        """The first frame that a client gets."""
        return {
            "observation": self._entries(),
            "actions": {"shape": [self.horizon, len(self.action_names)], "dtype": "float32"},
            "horizon": self.horizon,
            "control_hz": self.control_hz,
            "state_names": list(self.state_names),
            "action_names": list(self.action_names),
            "options": list(self.options),
            "samples": list(self.samples),
            "max_rows": self.max_rows,
            "max_pixels": self.max_pixels,
            "max_bytes": self.max_bytes,
            **({"described_robot": self.robot.name} if self.robot else {}),
            **({"default_prompt": self.default_prompt} if self.default_prompt else {}),
            **({"reset_pose": list(self.robot.reset_pose)} if self.robot and self.robot.reset_pose else {}),
            **self.about,
        }

    def _entries(self) -> dict[str, Any]:
        """Shape and type of each entry of a request."""
        first = {c.name for c in self.robot.cameras if c.layout == "chw"} if self.robot else set()
        images = {
            self.key_of(camera): {"shape": [3, *size] if camera in first else [*size, 3], "dtype": "uint8"}
            for camera, size in self.cameras.items()
        }
        sizes = {STATE: len(self.state_names)} if self.robot is None else entries(self.robot)
        state = {key: {"shape": [size], "dtype": "float32"} for key, size in sizes.items()}
        prompt = PROMPT if self.robot is None else self.robot.instruction[0]
        return {**images, **state, prompt: {"shape": [], "dtype": "str"}}

    def zeros(self, prompt: str) -> dict[str, Any]:
        """An observation of nothing, for warming up."""
        images = {camera_key(camera): np.zeros((*size, 3), np.uint8) for camera, size in self.cameras.items()}
        return {**images, STATE: np.zeros(len(self.state_names), np.float32), PROMPT: prompt}
