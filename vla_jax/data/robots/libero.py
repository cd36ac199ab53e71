"""LIBERO: a simulated Franka arm, one camera in front and one on the wrist, 20 Hz.

The state is position, axis-angle and both fingers (3 + 3 + 2); actions are motions of the end effector already, 3 + 3 +
1. Images are turned by 180° by the client, in training and here.

Source: openpi 15a9616, policies/libero_policy.py, examples/libero/main.py, training/config.py (extra_delta_transform of
pi0_libero); the rate is LIBERO's (control_freq, libero/envs/env_wrapper.py).
"""

import dataclasses

from vla_jax.data.robots.description import Camera, Part, RobotDescription

LIBERO = RobotDescription(
    name="libero",
    state=(
        Part(name="pose", key="observation/state", dims=6, names=("x", "y", "z", "rx", "ry", "rz")),
        Part(name="finger", key="observation/state", start=6, dims=2),
    ),
    actions=(
        Part(name="motion", dims=6, names=("dx", "dy", "dz", "drx", "dry", "drz")),
        Part(name="gripper", dims=1),
    ),
    cameras=(
        Camera(name="image", fills="base_0_rgb"),
        Camera(name="wrist_image", fills="left_wrist_0_rgb"),
    ),
    absent=("right_wrist_0_rgb",),
    control_hz=20.0,
)
"""pi05_libero (with --no-state-in-prompt)."""

LIBERO_RELATIVE = dataclasses.replace(
    LIBERO,
    name="libero_relative",
    actions=(
        Part(name="motion", dims=6, names=("dx", "dy", "dz", "drx", "dry", "drz"), relative_to="pose"),
        Part(name="gripper", dims=1),
    ),
)
"""pi0_libero: the pose is subtracted once more from motions that are relative already, as its weights were trained."""

LIBERO_FAST = dataclasses.replace(LIBERO_RELATIVE, name="libero_fast", absent_as="black")
"""pi0_fast_libero: the same, with the absent camera black and not masked."""
