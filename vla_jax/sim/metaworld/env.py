"""A batch of MetaWorld episodes behind the `VectorEnv` interface, in LeRobot's evaluation protocol."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vla_jax.sim.env import EnvSpec
from vla_jax.sim.metaworld.render import CAMERA, Renderer
from vla_jax.sim.metaworld.simulator import CONTROL_HZ, MAX_STEPS, Simulator
from vla_jax.sim.metaworld.tasks import find_task
from vla_jax.types import Observation

STATE_NAMES = ("x_m", "y_m", "z_m", "gripper_opening")
ACTION_NAMES = ("dx_cm", "dy_cm", "dz_cm", "gripper_closing")


def metaworld_spec(image_size: int) -> EnvSpec:
    """The description of every MetaWorld task: they differ in nothing but the scene."""
    return EnvSpec(
        name="metaworld",
        cameras={CAMERA: (image_size, image_size)},
        state_names=STATE_NAMES,
        action_names=ACTION_NAMES,
        control_hz=CONTROL_HZ,
        max_steps=MAX_STEPS,
        keeps=("gripper_closing",),
    )


class MetaWorldEnv:
    """One simulation per entry of `tasks`; implements `vla_jax.sim.env.VectorEnv`.

    `instruction` is "own" (each task is asked for in its own words) or the name of another task whose
    sentence is given to all: the test of whether a policy listens. A simulation takes about 30 MB, so give at
    most some dozens at a time.
    """

    def __init__(self, tasks: Sequence[str], image_size: int = 64, instruction: str = "own"):
        if not tasks:
            raise ValueError("MetaWorldEnv needs at least one task")
        if not 8 <= image_size <= 480:
            raise ValueError(f"image_size {image_size} is not between 8 and 480 pixels")
        self.spec = metaworld_spec(image_size)
        self._tasks = tuple(find_task(name) for name in tasks)
        self._instruction = (
            tuple(task.instruction for task in self._tasks)
            if instruction == "own"
            else (find_task(instruction).instruction,) * len(self._tasks)
        )
        self._simulators = [Simulator(task.name) for task in self._tasks]
        self._renderer = Renderer(image_size)
        for simulator in self._simulators:
            if not self._renderer.has_model(simulator.task.name):
                self._renderer.add_model(simulator.task.name, simulator.model)
        self._seeds: tuple[int, ...] = ()
        self._images = np.zeros((len(self._tasks), image_size, image_size, 3), np.uint8)

    def reset(self, seeds: Sequence[int]) -> Observation:
        """Starts one episode per task, with `seeds[i]` for `tasks[i]`."""
        if len(seeds) != len(self._tasks):
            raise ValueError(f"{len(seeds)} seeds for {len(self._tasks)} tasks; give one seed per task")
        self._seeds = tuple(int(seed) for seed in seeds)
        for i, (simulator, seed) in enumerate(zip(self._simulators, self._seeds)):
            simulator.reset(seed)
            self._render(i)
        return self._observe()

    def advance(self, actions: Float[np.ndarray, "b k a"]) -> Observation:
        """Runs k steps of actions in [-1, 1]; an episode stops at its first success or after 500 steps."""
        if not self._seeds:
            raise ValueError("call reset before advance")
        actions = np.asarray(actions, np.float64)
        if actions.ndim != 3 or (actions.shape[0], actions.shape[2]) != (len(self._tasks), len(ACTION_NAMES)):
            raise ValueError(
                f"actions have shape {actions.shape}, expected ({len(self._tasks)}, k, {len(ACTION_NAMES)})"
            )
        if not np.isfinite(actions).all():
            raise ValueError("actions contain NaN or infinity")
        for i, simulator in enumerate(self._simulators):
            if simulator.done:
                continue
            for action in actions[i]:
                simulator.step(action)
                if simulator.done:
                    break
            self._render(i)
        return self._observe()

    @property
    def done(self) -> Bool[np.ndarray, " b"]:
        """Which episodes have succeeded or run out of time."""
        return np.array([simulator.done for simulator in self._simulators])

    def results(self) -> list[dict[str, Any]]:
        """One record per episode: `task, group, seed, success, steps, time_s` (simulated)."""
        return [
            {
                "task": simulator.task.name,
                "group": simulator.task.group,
                "seed": seed,
                "success": simulator.success,
                "steps": simulator.steps,
                "time_s": simulator.steps / CONTROL_HZ,
            }
            for simulator, seed in zip(self._simulators, self._seeds)
        ]

    def close(self) -> None:
        """Frees simulations and OpenGL resources."""
        self._renderer.close()
        for simulator in self._simulators:
            simulator.close()

    def _render(self, i: int) -> None:
        simulator = self._simulators[i]
        self._images[i] = self._renderer.picture(simulator.task.name, simulator.data)

    def _observe(self) -> Observation:
        return Observation(
            images={CAMERA: self._images.copy()},
            state=np.stack([simulator.state for simulator in self._simulators]),
            instruction=self._instruction,
        )
