"""DROID: a Franka arm with a Robotiq gripper, one camera beside it and one on its wrist.

Source: openpi 15a9616, policies/droid_policy.py (8 actions; π0-FAST's cameras have other names, and the one that is
missing is not masked), examples/droid/main.py (keys, 15 Hz), training/config.py (relative dims 7, -1).
"""

import dataclasses

from vla_jax.data.robots.description import Camera, Part, RobotDescription

DROID = RobotDescription(
    name="droid",
    state=(
        Part(name="joint", key="observation/joint_position", dims=7),
        Part(name="gripper", key="observation/gripper_position", dims=1),
    ),
    actions=(Part(name="joint_velocity", dims=7), Part(name="gripper", dims=1)),
    cameras=(
        Camera(name="exterior_image_1_left", fills="base_0_rgb"),
        Camera(name="wrist_image_left", fills="left_wrist_0_rgb"),
    ),
    absent=("right_wrist_0_rgb",),
    unused=("observation/exterior_image_2_left",),
    control_hz=15.0,
)

DROID_JOINT_POSITION = dataclasses.replace(
    DROID,
    name="droid_joint_position",
    actions=(
        Part(name="joint_target", dims=7, relative_to="joint"),
        Part(name="gripper", dims=1),
    ),
)
"""Policies that were fine-tuned on joint positions, relative to the measured ones (pi05_full_droid_finetune)."""

DROID_FAST = dataclasses.replace(
    DROID,
    name="droid_fast",
    cameras=(
        Camera(name="exterior_image_1_left", fills="base_0_rgb"),
        Camera(name="wrist_image_left", fills="wrist_0_rgb"),
    ),
    absent=("base_1_rgb",),
    absent_as="black",
)
"""π0-FAST-DROID (pi0_fast_droid)."""
