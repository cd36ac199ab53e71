"""The one interface through which policies are evaluated and experts demonstrate: a batch of environments.

`advance` runs a whole chunk of actions before the next picture is taken, because rendering is what costs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float

from vla_jax.types import Observation


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvSpec:
    """What an environment shows and takes."""

    name: str
    cameras: dict[str, tuple[int, int]]
    """Camera name to (height, width)."""
    state_names: tuple[str, ...]
    """One name with unit per state dimension, e.g. ``x_m``."""
    action_names: tuple[str, ...]
    """One name with unit per action dimension, e.g. ``vx_m_per_s``."""
    control_hz: float
    max_steps: int
    keeps: tuple[str, ...] = ()
    """Actions that keep their last value while a robot waits for its policy (a gripper); the others, rates, are 0."""

    @property
    def kept(self) -> Bool[np.ndarray, " a"]:
        """Which action dimensions are in `keeps`."""
        return np.asarray([name in self.keeps for name in self.action_names])


class VectorEnv(Protocol):
    """A batch of b environments that run in lockstep until each is done."""

    spec: EnvSpec

    def reset(self, seeds: Sequence[int]) -> Observation:
        """Starts b = len(seeds) episodes; an episode is a pure function of its seed and the actions."""
        ...

    def advance(self, actions: Float[np.ndarray, "b k a"]) -> Observation:
        """Runs k control steps; environments that are done (before or within the chunk) stay as they are."""
        ...

    @property
    def done(self) -> Bool[np.ndarray, " b"]:
        """Which episodes have ended (success, failure or time)."""
        ...

    def results(self) -> list[dict[str, Any]]:
        """One record per episode with at least `seed, task, success, steps, time_s`."""
        ...
