"""One MetaWorld episode at a time: seeding, stepping, success."""

from typing import Any

import numpy as np
from jaxtyping import Float

from vla_jax.sim.metaworld.headless import load_mujoco
from vla_jax.sim.metaworld.render import CAMERA, CAMERA_POSITION_M
from vla_jax.sim.metaworld.tasks import find_task

MAX_STEPS = 500
CONTROL_HZ = 80.0
STATE_DIM = 4


class Simulator:
    """A task whose episodes are pure functions of (seed, actions). No pictures: see `render.Renderer`."""

    def __init__(self, task: str):
        self.task = find_task(task)
        self._mj = load_mujoco()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        self._expert_class = ENV_POLICY_MAP[task]
        env = ALL_V3_ENVIRONMENTS[task]()
        env._set_task_called = True
        # A new scene at every reset, from the generator that `env.seed` sets (`env.reset` ignores its seed).
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        # Experts need the goal. The observation's bounds, cached while it was hidden, would clip it to 0.
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)
        env.model.camera(CAMERA).pos = CAMERA_POSITION_M
        self._env = env
        self.steps = 0
        self.success = False
        self.observation: Float[np.ndarray, " o"] = np.zeros(39)
        """MetaWorld's own 39 numbers, goal included: what an expert sees."""

    @property
    def model(self) -> Any:
        """The `MjModel`."""
        return self._env.model

    @property
    def data(self) -> Any:
        """The `MjData`: what a renderer needs."""
        return self._env.data

    @property
    def state(self) -> Float[np.ndarray, "4"]:
        """What a policy may know besides the picture: hand position (m) and gripper opening (0 to 1)."""
        return self.observation[:STATE_DIM].astype(np.float32)

    @property
    def done(self) -> bool:
        """Success, or out of time."""
        return self.success or self.steps >= MAX_STEPS

    def reset(self, seed: int) -> None:
        """Starts the episode `seed`."""
        self._env.seed(seed)
        self.observation, _ = self._env.reset()
        self._mj.mj_forward(self.model, self.data)  # or the first picture shows the goal where it was before
        self.steps, self.success = 0, False

    def step(self, action: Float[np.ndarray, "4"]) -> None:
        """One control step (12.5 ms). Actions are clipped to [-1, 1]; success, once reached, stays."""
        self.observation, _, _, _, info = self._env.step(np.clip(action, -1.0, 1.0))
        self.steps += 1
        self.success = self.success or bool(info["success"])

    def expert(self) -> Any:
        """A fresh scripted expert of this task; ask it through `expert_action`."""
        return self._expert_class()

    def close(self) -> None:
        """Frees the simulation."""
        self._env.close()
