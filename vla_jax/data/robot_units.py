"""A robot's state and actions in the model's units and back: the arithmetic of its description."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from vla_jax.data.robots.conversions import CONVERSIONS, Conversion
from vla_jax.data.robots.description import Part, RobotDescription
from vla_jax.data.sample import Sample, check_dims


class _Curve(NamedTuple):
    dims: slice
    conversion: Conversion


@dataclasses.dataclass(frozen=True)
class Units:
    """model = scale · convert(robot) + offset for joined parts, in float64 so that it comes back exactly."""

    scale: Float[np.ndarray, " dims"]
    offset: Float[np.ndarray, " dims"]
    curves: tuple[_Curve, ...]

    @classmethod
    def of(cls, parts: tuple[Part, ...]) -> "Units":
        """The conversion of a state or of actions, from the parts that they consist of."""
        curves, first = [], 0
        for part in parts:
            if part.convert:
                curves.append(_Curve(slice(first, first + part.dims), CONVERSIONS[part.convert]))
            first += part.dims
        scale, offset = (
            np.concatenate([part.each(field) for part in parts]) for field in ("scale", "offset")
        )
        return cls(scale, offset, tuple(curves))

    @property
    def same(self) -> bool:
        """Whether the robot's units are the model's."""
        return not self.curves and bool((self.scale == 1).all() and (self.offset == 0).all())

    def to_model(self, x: Float[np.ndarray, "*n dims"]) -> Float[np.ndarray, "*n dims"]:
        """From the robot's units."""
        x = np.array(x, np.float64)
        for dims, conversion in self.curves:
            x[..., dims] = conversion.to_model(x[..., dims])
        return x * self.scale + self.offset

    def to_robot(self, x: Float[np.ndarray, "*n dims"]) -> Float[np.ndarray, "*n dims"]:
        """The inverse of `to_model`."""
        x = (np.asarray(x, np.float64) - self.offset) / self.scale
        for dims, conversion in self.curves:
            x[..., dims] = conversion.to_robot(x[..., dims])
        return x


@dataclasses.dataclass(frozen=True)
class RobotUnits:
    """State and actions in the model's units; relative actions are from here on, a_i - state_j, in those units.

    `outputs` reads the state in the robot's units, as the observation has it. Both keep what they return in float64
    until it is normalised, or returned to the robot: a difference of float32 numbers then comes back to the bit.
    """

    robot: RobotDescription
    _state: Units = dataclasses.field(init=False, repr=False, compare=False)
    _actions: Units = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_state", Units.of(self.robot.state))
        object.__setattr__(self, "_actions", Units.of(self.robot.actions))

    @property
    def relative(self) -> bool:
        """Whether some action is relative to the state."""
        return any(dim >= 0 for dim in self.robot.relative)

    @property
    def changes_actions(self) -> bool:
        """Whether the model's actions are others than the robot's."""
        return self.relative or not self._actions.same

    @property
    def action_scale(self) -> Float[np.ndarray, " a"]:
        """Size of the model's unit in the robot's, for each action."""
        return 1 / np.abs(self._actions.scale)

    def state(self, state: Float[np.ndarray, "*n q"]) -> Float[np.ndarray, "*n q"]:
        """In the model's units, float64; unchanged where these are the robot's."""
        check_dims("state", state, len(self._state.scale))
        return state if self._state.same else self._state.to_model(state)

    def robot_state(self, state: Float[np.ndarray, "*n q"]) -> Float[np.ndarray, "*n q"]:
        """The inverse of `state`."""
        return state if self._state.same else self._state.to_robot(state)

    def actions(
        self, actions: Float[np.ndarray, "*n k a"], state: Float[np.ndarray, "... q"]
    ) -> Float[np.ndarray, "*n k a"]:
        """To the model's units, the state given in the robot's; unchanged where nothing is to be done."""
        check_dims("action", actions, len(self._actions.scale))
        if not self.changes_actions:
            return actions
        return self._actions.to_model(actions) - self._subtracted(state)

    def robot_actions(
        self, actions: Float[np.ndarray, "*n k a"], state: Float[np.ndarray, "... q"]
    ) -> Float[np.ndarray, "*n k a"]:
        """The inverse of `actions`."""
        check_dims("action", actions, len(self._actions.scale))
        if not self.changes_actions:
            return actions
        back = self._actions.to_robot(np.asarray(actions, np.float64) + self._subtracted(state))
        return back.astype(np.float32)

    def inputs(self, sample: Sample) -> Sample:
        """State and actions to the model's units."""
        changes = {"state": self.state(sample.state)}
        if sample.actions is not None:
            changes["actions"] = self.actions(sample.actions, sample.state)
        return sample.replace(**changes)

    def outputs(self, sample: Sample) -> Sample:
        """Actions in the robot's units."""
        return sample.replace(actions=self.robot_actions(sample.chunk, sample.state))

    def _subtracted(self, state: Float[np.ndarray, "*n q"]) -> Float[np.ndarray, "*n 1 a"]:
        """What relative actions are relative to; 0 for absolute ones."""
        check_dims("state", state, len(self._state.scale))
        of = np.asarray(self.robot.relative)
        return np.where(of >= 0, self._state.to_model(state)[..., of], 0.0)[..., None, :]
