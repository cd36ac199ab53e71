"""Units that are no multiple of one another: a table of functions with their inverses, named in descriptions.

A description holds values only, so that a file can't make the program run code; what is no multiple and no offset has
its place here.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Curve = Callable[[Float[np.ndarray, "*n"]], Float[np.ndarray, "*n"]]


class Conversion(NamedTuple):
    """The robot's value to the model's, and back."""

    to_model: Curve
    to_robot: Curve


ALOHA_FINGERS = (0.01844, 0.05800)
"""Position of a finger when the gripper is closed and open, in metres (ALOHA, aloha_scripts/constants.py)."""
ALOHA_ANGLES = (0.5476, 1.6296)
"""The same of the motor, in radians: encoder counts 2405 and 3110 of 4096 a turn, zero at 2048 (π0's own data; openpi,
policies/aloha_policy.py)."""
HORN, ARM = 0.022, 0.036
"""The crank on the motor and the rod from there to the finger, in metres (Interbotix, the vx300s's gripper)."""


def _finger_to_angle(opening: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """ALOHA's opening 0 … 1, linear in the finger's position p, to 0 … 1 linear in the motor's angle θ.

    Law of cosines in the triangle of crank r, rod l and p: sin θ = (r² + p² - l²) / (2 r p).
    """
    closed, opened = ALOHA_FINGERS
    position = closed + opening * (opened - closed)
    # A reading below the closed position can leave the triangle; and the sine with it.
    sine = (HORN**2 + position**2 - ARM**2) / (2 * HORN * position)
    low, high = ALOHA_ANGLES
    return (np.arcsin(np.clip(sine, -1.0, 1.0)) - low) / (high - low)


def _angle_to_finger(angle: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """The positive root of p² - 2 r p sin θ + r² - l² = 0."""
    low, high = ALOHA_ANGLES
    theta = low + angle * (high - low)
    position = HORN * np.sin(theta) + np.sqrt(ARM**2 - (HORN * np.cos(theta)) ** 2)
    closed, opened = ALOHA_FINGERS
    return (position - closed) / (opened - closed)


CONVERSIONS: Mapping[str, Conversion] = {
    "aloha_finger_to_angle": Conversion(_finger_to_angle, _angle_to_finger),
}
