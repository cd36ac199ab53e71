"""Demonstrations by MetaWorld's scripted experts, clean or with disturbed actions.

In a noisy demonstration the executed action is disturbed, while the label stays what the expert wants at the
state it got into: the policy learns to recover (as DART, Laskey et al. 2017, does with Gaussian noise).
"""

import dataclasses
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vla_jax.sim.metaworld.render import Renderer
from vla_jax.sim.metaworld.simulator import MAX_STEPS, Simulator

EXTRA_FRAMES = 10  # after success, so that the policy also sees what being done looks like
NOISE_STD = 0.3
BURST_START = 0.015  # probability per step of a burst: one random push, held
BURST_STEPS = (3, 9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A successful episode of t steps: what was seen before each action, and the action the expert wanted."""

    images: UInt8[np.ndarray, "t h w 3"]
    state: Float[np.ndarray, "t 4"]
    actions: Float[np.ndarray, "t 4"]
    success_step: int
    """The step after which success was first reported, counted from 1."""


class Disturbance:
    """Gaussian noise plus bursts on the hand's motion. The gripper is left alone: it would drop things."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng((seed, 1))
        self._left = 0
        self._push = np.zeros(3)

    def __call__(self, action: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4"]:
        """The executed action, within [-1, 1]."""
        if self._left == 0 and self._rng.random() < BURST_START:
            self._left = int(self._rng.integers(BURST_STEPS[0], BURST_STEPS[1] + 1))
            self._push = self._rng.uniform(-1.0, 1.0, 3)
        noisy = action.copy()
        noisy[:3] += NOISE_STD * self._rng.standard_normal(3)
        if self._left > 0:
            self._left -= 1
            noisy[:3] = self._push
        return np.clip(noisy, -1.0, 1.0)


def expert_action(expert: Any, observation: Float[np.ndarray, " o"]) -> Float[np.ndarray, "4"]:
    """The expert's action, clipped to [-1, 1]: raw ones reach 6.8, which the simulator would clip anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # metaworld warns of exactly this clipping
        return np.clip(np.asarray(expert.get_action(observation), np.float64), -1.0, 1.0)


def demonstrate(
    simulator: Simulator, renderer: Renderer | None, seed: int, noisy: bool
) -> Demonstration | None:
    """One episode, or None where the expert did not succeed within 500 steps.

    Without a renderer the pictures have no pixels ([t 0 0 3]): for statistics of the experts alone.
    """
    simulator.reset(seed)
    expert = simulator.expert()
    disturb = Disturbance(seed) if noisy else None
    images, states, actions = [], [], []
    success_step = None
    while simulator.steps < MAX_STEPS:
        action = expert_action(expert, simulator.observation)
        images.append(
            np.zeros((0, 0, 3), np.uint8)
            if renderer is None
            else renderer.picture(simulator.task.name, simulator.data)
        )
        states.append(simulator.state)
        actions.append(action.astype(np.float32))
        simulator.step(action if disturb is None else disturb(action))
        if success_step is None and simulator.success:
            success_step = simulator.steps
        if success_step is not None and simulator.steps == success_step + EXTRA_FRAMES:
            break
    if success_step is None:
        return None
    return Demonstration(
        images=np.stack(images),
        state=np.stack(states),
        actions=np.stack(actions),
        success_step=success_step,
    )
