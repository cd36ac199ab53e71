"""A 2-D table with objects, an obstacle and a gripper: pure JAX, a function of seeds."""

from vla_jax.sim.tabletop.config import KINDS, TabletopConfig
from vla_jax.sim.tabletop.demos import Demonstrations, generate
from vla_jax.sim.tabletop.env import TabletopEnv
from vla_jax.sim.tabletop.language import parse_plan, plan_text, with_side

__all__ = [
    "KINDS",
    "Demonstrations",
    "TabletopConfig",
    "TabletopEnv",
    "generate",
    "parse_plan",
    "plan_text",
    "with_side",
]
