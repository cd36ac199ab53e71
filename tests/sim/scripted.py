"""Policies that know the tabletop's simulator: what evaluation must report for them is known beforehand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.sim.tabletop import TabletopEnv, parse_plan, plan_text
from vla_jax.sim.tabletop.expert import expert_action
from vla_jax.sim.tabletop.geometry import LEFT, RIGHT
from vla_jax.sim.tabletop.world import COLOURS, SHAPES, step


@functools.partial(jax.jit, static_argnums=(0, 4))
def expert_chunk(config, scenes, states, sides, horizon: int):
    """The expert's next actions, [b k 3], found by simulating it."""

    def one(states, _):
        actions = jax.vmap(functools.partial(expert_action, config))(scenes, states, sides)
        return jax.vmap(functools.partial(step, config))(scenes, states, actions), actions

    return jnp.swapaxes(jax.lax.scan(one, states, length=horizon)[1], 0, 1)


class ExpertPolicy:
    """Listens to the instruction and to plans, and otherwise does as the expert.

    It looks into the tables that were reset last, and finds the ones it is asked about by position. `deaf=True`
    follows the scene's own target whatever it is told.
    """

    horizon, execute = 8, 8
    writes_plans = sees_plans = True
    action_scale = np.array([0.1, 0.1, 0.5])

    def __init__(self, deaf: bool = False):
        self.deaf = deaf
        self.asked = []

    def plan(self, observation, key, temperature):
        return [
            plan_text("left" if i % 2 else "right", named(text))
            for i, text in enumerate(observation.instruction)
        ]

    def act(self, observation, key, *, solver, plan=None, plan_visible=False, samples=1):
        assert plan_visible or plan is None
        self.asked.append((len(observation.instruction), plan_visible, samples))
        env = TRACKED[-1]
        away = np.abs(observation.state[:, None, :2] - np.asarray(env.state.position)).max(-1)
        rows = away.argmin(axis=1)
        assert away.min(axis=1).max() == 0
        scenes, sides = env.episodes.scene, np.array(env.episodes.side)
        if self.deaf:
            scenes = dataclasses.replace(scenes, target=env.episodes.own_target)
        for row, text in zip(rows, plan or ()):
            sides[row] = {"left": LEFT, "right": RIGHT, None: sides[row]}[parse_plan(text)[0]]
        # For all tables and not only those asked about, so that little is compiled.
        chunk = np.asarray(expert_chunk(env.config, scenes, env.state, sides, self.horizon))[rows]
        return chunk if samples == 1 else np.repeat(chunk[:, None], samples, axis=1)


def named(instruction: str) -> str:
    """The object that an instruction names."""
    return next(f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" in instruction)


TRACKED: list[TabletopEnv] = []


class TrackedTabletop(TabletopEnv):
    """A tabletop that scripted policies can look into."""

    def reset(self, seeds):
        TRACKED.append(self)
        return super().reset(seeds)
