"""MetaWorld 3.1 (extra `sim`): 50 tabletop tasks of a Sawyer arm, rendered headless, with scripted experts.

The protocol is that of LeRobot's evaluation, so that success rates can be compared: camera ``corner2`` moved
to (.75, .075, .7) m, both image axes flipped, state = the first four observations, 500 steps, success at any
step. Neither metaworld nor mujoco is imported before a simulator is built.
"""

from vla_jax.sim.metaworld.demos import Demonstration, demonstrate
from vla_jax.sim.metaworld.env import MetaWorldEnv
from vla_jax.sim.metaworld.tasks import GROUPS, TASKS, find_task

__all__ = ["GROUPS", "TASKS", "Demonstration", "MetaWorldEnv", "demonstrate", "find_task"]
