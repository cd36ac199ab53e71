"""What happens to a sample between the data set (or the robot) and the model, and back.

Each transform is a frozen dataclass: `inputs` takes a sample towards the model, `outputs` takes the model's
actions back to the robot's units (it acts on `actions` alone; its last axes are [k a], any number may lead).
The list that was trained with is stored in the checkpoint by `to_json` and replayed from `from_json`, so the
two cannot drift apart. A statistic that is missing or of another size is an error, never skipped.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vla_jax.data.fast.codec import FastTokenizer
from vla_jax.data.fast.ids import ActionIds
from vla_jax.data.fast.transform import TokenizeActions
from vla_jax.data.normalize import Normalize
from vla_jax.data.prompt_forms import Prompt
from vla_jax.data.resize import Fit, resize_with_pad
from vla_jax.data.robot_units import RobotUnits
from vla_jax.data.robots.description import RobotDescription
from vla_jax.data.sample import Sample, Transform, check_dims
from vla_jax.data.statistics import Statistics
from vla_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SelectCameras:
    """Keeps the cameras the model sees; one that a sample lacks becomes a masked black image."""

    cameras: dict[str, tuple[int, int]]
    """The model's camera → (height, width) of the black image."""
    fills: dict[str, str] | None = None
    """The model's camera → the sample's that it is; a camera that is not named is always absent. None: their names are
    the same."""
    black: tuple[str, ...] = ()
    """Cameras of the model whose black image counts as one that is there, as π0-FAST was trained."""

    def __post_init__(self):
        sizes = {camera: (int(size[0]), int(size[1])) for camera, size in self.cameras.items()}
        object.__setattr__(self, "cameras", sizes)
        object.__setattr__(self, "black", tuple(self.black))

    @property
    def sources(self) -> dict[str, str]:
        """The model's camera → the sample's, of those that can be there."""
        same = {camera: camera for camera in self.cameras}
        return same if self.fills is None else {name: self.fills[name] for name in same if name in self.fills}

    def blank(self, camera: str) -> UInt8[np.ndarray, "h w 3"]:
        """The black image of an absent camera."""
        return np.zeros((*self.cameras[camera], 3), np.uint8)

    def inputs(self, sample: Sample) -> Sample:
        """Exactly `cameras`, and `image_mask` for them. A sample with none of them is an error (where the model looks
        at any)."""
        found = {name: sample.images[of] for name, of in self.sources.items() if of in sample.images}
        if self.cameras and not found:
            wanted = list(self.sources.values())
            raise ValueError(
                f"the observation has cameras {sorted(sample.images)}, none of the model's {wanted}"
            )
        images = {name: found[name] if name in found else self.blank(name) for name in self.cameras}
        mask = {name: name in found or name in self.black for name in self.cameras}
        return sample.replace(images=images, image_mask=mask)

    def outputs(self, sample: Sample) -> Sample:
        """Nothing to undo."""
        return sample


@dataclasses.dataclass(frozen=True)
class ResizeImages:
    """Images of another size are scaled into [height, width], bilinear, keeping their proportions, on black."""

    height: int
    width: int
    fit: Fit = "exact"
    """How the scaled size is rounded: openpi's way in policies that were converted from it."""

    def __post_init__(self):
        if self.fit not in typing.get_args(Fit):
            raise ValueError(f"ResizeImages(fit={self.fit!r}): use one of {', '.join(typing.get_args(Fit))}")

    def inputs(self, sample: Sample) -> Sample:
        """Images of the right size are left as they are."""
        images = {camera: self.resize(image) for camera, image in sample.images.items()}
        return sample.replace(images=images)

    def outputs(self, sample: Sample) -> Sample:
        """Nothing to undo."""
        return sample

    def resize(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "height width 3"]:
        """One image scaled and padded to [height, width]."""
        return resize_with_pad(image, self.height, self.width, self.fit)


@dataclasses.dataclass(frozen=True)
class PadDims:
    """State and actions padded with zeros to the model's dimensions; padded action dims are masked."""

    state_dim: int
    """The model's state dimensions."""
    action_dim: int
    """The model's action dimensions."""
    robot_action_dim: int
    """The robot's own action dimensions."""

    def __post_init__(self):
        if self.robot_action_dim > self.action_dim:
            raise ValueError(
                f"the data have {self.robot_action_dim} action dims, the model {self.action_dim}; use "
                f"model.expert.action_dim={self.robot_action_dim} or more, or 0 for as many as the data have"
            )

    def inputs(self, sample: Sample) -> Sample:
        """Pads the last axis of state, actions and their mask. Raises ValueError for more than the model's."""
        if sample.state.shape[-1] > self.state_dim:
            raise ValueError(
                f"the state has {sample.state.shape[-1]} dims, the model {self.state_dim}; use "
                f"model.expert.state_dim={sample.state.shape[-1]} or more, or 0 for as many as the data have"
            )
        changes: dict[str, Any] = {"state": _pad(sample.state, self.state_dim)}
        if sample.actions is not None:
            check_dims("action", sample.actions, self.robot_action_dim)
            changes["actions"] = _pad(sample.actions, self.action_dim)
            changes["action_mask"] = _pad(sample.chunk_mask, self.action_dim)
        return sample.replace(**changes)

    def outputs(self, sample: Sample) -> Sample:
        """Cuts the padding off."""
        check_dims("model action", sample.chunk, self.action_dim)
        return sample.replace(actions=sample.chunk[..., : self.robot_action_dim])


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Instruction and text target to token ids."""

    tokenizer: Tokenizer
    max_tokens: int
    """Length of a row: prompt and target together."""
    max_target_tokens: int
    """Most tokens of a target, its end included."""
    prompt: Prompt = Prompt()
    """What the instruction becomes; with a form that has the state in it, this stands before PadDims."""

    def inputs(self, sample: Sample) -> Sample:
        """Sets `text`. Raises ValueError where it does not fit."""
        pieces = self.prompt.pieces(sample.instruction, sample.state)
        text = self.tokenizer.encode_pieces(
            pieces, sample.text_target, self.max_tokens, self.max_target_tokens
        )
        return sample.replace(text=text)

    def lengths(self, sample: Sample) -> tuple[int, int]:
        """How many tokens a sample needs: for all of its text, and for the target with its end."""
        return self.tokenizer.lengths(
            self.prompt.pieces(sample.instruction, sample.state), sample.text_target
        )

    def outputs(self, sample: Sample) -> Sample:
        """Nothing to undo."""
        return sample


_TYPES: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (RobotUnits, SelectCameras, ResizeImages, Normalize, TokenizeActions, PadDims, Tokenize)
}

LATER = ("fills", "black", "unscaled", "limit")
"""Fields that older checkpoints do not have."""


def apply_inputs(transforms: Sequence[Transform], sample: Sample) -> Sample:
    """All transforms in order."""
    for transform in transforms:
        sample = transform.inputs(sample)
    return sample


def apply_outputs(transforms: Sequence[Transform], sample: Sample) -> Sample:
    """All transforms backwards, from the model's actions to the robot's."""
    for transform in reversed(transforms):
        sample = transform.outputs(sample)
    return sample


def to_json(transforms: Sequence[Transform]) -> list[dict[str, Any]]:
    """The transforms with all they need (statistics, tokenizer) as JSON values."""
    result = []
    for transform in transforms:
        values = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform) if f.init}
        # Left out where they are what files from before these fields mean, so that equal transforms stay equal.
        if isinstance(transform, ResizeImages) and transform.fit == "exact":
            del values["fit"]
        for name in LATER:  # left out where they say nothing, so that equal bundles of any age stay equal
            if name in values and not values[name]:
                del values[name]
        if isinstance(transform, Normalize):
            values["statistics"] = {
                key: dataclasses.asdict(statistics) for key, statistics in transform.statistics.items()
            }
            if not transform.floor:
                del values["floor"]
        elif isinstance(transform, Tokenize):
            values["tokenizer"] = transform.tokenizer.to_files()
            values["prompt"] = dataclasses.asdict(transform.prompt)
        elif isinstance(transform, TokenizeActions):
            values |= {"fast": transform.fast.to_files(), "ids": dataclasses.asdict(transform.ids)}
        elif isinstance(transform, RobotUnits):
            values["robot"] = transform.robot.to_json()
        result.append({"type": type(transform).__name__, **values})
    return result


def from_json(values: Sequence[Mapping[str, Any]]) -> tuple[Transform, ...]:
    """The inverse of `to_json`. Raises ValueError for an unknown transform or a missing value."""
    transforms = []
    for entry in values:
        arguments = dict(entry)
        name = arguments.pop("type", None)
        if name not in _TYPES:
            raise ValueError(f"stored transform {name!r} is unknown; this version has {sorted(_TYPES)}")
        try:
            if name == "Normalize":
                statistics = arguments["statistics"]
                arguments["statistics"] = {key: Statistics.from_json(v) for key, v in statistics.items()}
                arguments.setdefault("floor", False)
            elif name == "Tokenize":
                arguments["tokenizer"] = Tokenizer.from_files(arguments["tokenizer"])
                arguments["prompt"] = Prompt(**arguments.get("prompt", {}))
            elif name == "RobotUnits":
                arguments["robot"] = RobotDescription.from_json(arguments["robot"], "the stored robot")
            elif name == "TokenizeActions":
                arguments["fast"] = FastTokenizer.from_files(arguments["fast"])
                ids = arguments["ids"]
                arguments["ids"] = ActionIds(**ids | {"begin": tuple(ids["begin"]), "end": tuple(ids["end"])})
            transforms.append(_TYPES[name](**arguments))
        except (KeyError, TypeError) as error:
            raise ValueError(f"stored transform {name} is incomplete: {error}") from None
    return tuple(transforms)


def _pad(x: np.ndarray, dims: int) -> np.ndarray:
    if x.shape[-1] == dims:
        return x
    result = np.zeros((*x.shape[:-1], dims), x.dtype)
    result[..., : x.shape[-1]] = x
    return result
