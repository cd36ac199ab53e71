"""A sample (one row of a batch in the making) and what it means to transform one."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from vla_jax.data.tokenizer import TextTokens


class ActionTokens(NamedTuple):
    """A chunk as one row of `Batch.action_tokens`, its mask and what is to be predicted."""

    tokens: Int[np.ndarray, " g"]
    mask: Bool[np.ndarray, " g"]
    loss: Bool[np.ndarray, " g"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of a batch in the making: what a robot sees, and for training what it should do.

    Where only states and actions count, for statistics, one sample holds them of many steps: [n q], [n k a] or [n a].
    """

    images: dict[str, UInt8[np.ndarray, "h w 3"]]
    state: Float[np.ndarray, "... q"]
    instruction: str
    text_target: str | None = None
    """The text to predict, or the plan to follow; None or "": none."""
    task: str | None = None
    """None: found from the instruction where it is needed."""
    actions: Float[np.ndarray, "*n k a"] | None = None
    action_mask: Bool[np.ndarray, "*n k a"] | None = None
    image_mask: dict[str, bool] = dataclasses.field(default_factory=dict)
    """Camera → whether there is an image; set by SelectCameras."""
    text: TextTokens | None = None
    """Set by Tokenize."""
    action_tokens: ActionTokens | None = None
    """Set by TokenizeActions."""

    @property
    def chunk(self) -> Float[np.ndarray, "*n k a"]:
        """The actions of a sample that has some."""
        if self.actions is None:
            raise ValueError("this sample has no actions")
        return self.actions

    @property
    def chunk_mask(self) -> Bool[np.ndarray, "*n k a"]:
        """Which of these actions count."""
        if self.action_mask is None:
            raise ValueError("this sample has no actions")
        return self.action_mask

    def replace(self, **changes: Any) -> "Sample":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@runtime_checkable
class Transform(Protocol):
    """One step of the way from sample to model and back: a frozen dataclass, whose fields are what is stored of it."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def inputs(self, sample: Sample) -> Sample:
        """A sample of the robot's data, one step towards the model."""
        ...

    def outputs(self, sample: Sample) -> Sample:
        """The model's actions, one step back towards the robot."""
        ...


def check_dims(field: str, x: np.ndarray, dims: int) -> None:
    """Raise a ValueError where the last axis is not the expected one."""
    if x.shape[-1] != dims:
        raise ValueError(f"{field} has {x.shape[-1]} dims, {dims} expected (of the data trained on)")
