"""ALOHA: two ViperX arms of six joints with a gripper each, up to four cameras, 50 Hz.

π0 was trained with other directions of some joints and with the motor's angle as the gripper's unit, so both sides are
converted; joints are then relative to the measured ones, grippers are not.

Source: openpi 15a9616, policies/aloha_policy.py (adapt_to_pi: signs, gripper, cameras), training/config.py (relative
dims 6, -1, 6, -1; reset_pose), examples/aloha_real/env.py and aloha_sim/env.py (channels first, cam_low is sent and
not read, 50 Hz, no prompt).
"""

import dataclasses

from vla_jax.data.robots.conversions import ALOHA_ANGLES
from vla_jax.data.robots.description import Camera, Part, RobotDescription

JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
SIGNS = (1.0, -1.0, -1.0, 1.0, 1.0, 1.0)
"""Factor of each joint from ALOHA's units to π0's."""
CLOSED, OPEN = -0.6213, 1.4910
"""The gripper's joint in radians, which a command of 0 … 1 stands for."""


def _state(side: str, start: int) -> tuple[Part, Part]:
    return (
        Part(
            name=f"{side}_arm",
            key="state",
            start=start,
            dims=6,
            names=tuple(f"{side}_{joint}" for joint in JOINTS),
            scale=SIGNS,
        ),
        Part(name=f"{side}_gripper", key="state", start=start + 6, dims=1, convert="aloha_finger_to_angle"),
    )


def _actions(side: str, relative: bool) -> tuple[Part, Part]:
    return (
        Part(
            name=f"{side}_arm",
            dims=6,
            names=tuple(f"{side}_{joint}" for joint in JOINTS),
            scale=SIGNS,
            relative_to=f"{side}_arm" if relative else "",
        ),
        # The command is linear in the angle already: 0 … 1 of the joint's range, measured from π0's zero.
        Part(name=f"{side}_gripper", dims=1, scale=(OPEN - CLOSED,), offset=(CLOSED - ALOHA_ANGLES[0],)),
    )


ALOHA = RobotDescription(
    name="aloha",
    state=(*_state("left", 0), *_state("right", 7)),
    actions=(*_actions("left", True), *_actions("right", True)),
    cameras=(
        Camera(name="cam_high", key="images/cam_high", fills="base_0_rgb", layout="chw"),
        Camera(
            name="cam_left_wrist",
            key="images/cam_left_wrist",
            fills="left_wrist_0_rgb",
            layout="chw",
            required=False,
        ),
        Camera(
            name="cam_right_wrist",
            key="images/cam_right_wrist",
            fills="right_wrist_0_rgb",
            layout="chw",
            required=False,
        ),
    ),
    unused=("images/cam_low",),
    control_hz=50.0,
    reset_pose=(0.0, -1.5, 1.5, 0.0, 0.0, 0.0),
)
"""The real robot (pi0_aloha, pi05_aloha, pi0_aloha_pen_uncap, …)."""

ALOHA_SIM = dataclasses.replace(
    ALOHA,
    name="aloha_sim",
    actions=(*_actions("left", False), *_actions("right", False)),
    default_prompt="Transfer cube",
)
"""gym-aloha's transfer of a cube (pi0_aloha_sim): actions are absolute."""
