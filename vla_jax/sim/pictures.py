"""From policies and episodes to the arrays that `sim.figures` draws."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vla_jax.data.observations import seen
from vla_jax.flow.config import SolverConfig
from vla_jax.sim import metrics
from vla_jax.sim.evaluate import EvaluablePolicy
from vla_jax.sim.figures.fan import Fan
from vla_jax.sim.figures.sheet import Film
from vla_jax.sim.rollout import Recording
from vla_jax.sim.tabletop import TabletopConfig, TabletopEnv
from vla_jax.sim.tabletop.world import move


def fan_rows(
    policies: Mapping[str, EvaluablePolicy],
    seeds: Sequence[int],
    key: jax.Array,
    *,
    solver: SolverConfig,
    samples: int = 32,
    plan: str | None = None,
    env_config: TabletopConfig = TabletopConfig(),
) -> list[list[Fan]]:
    """For each symmetric scene one fan per policy: sampled chunks, run open loop from the episode's start.

    `plan` is a text to follow, in which {target} stands for each scene's target.
    """
    env = TabletopEnv(env_config, kind="symmetric")
    observation = env.reset(seeds)
    start = np.asarray(env.state.position)
    targets = [env.scene_summary(i)["target"] for i in range(len(seeds))]
    plans = None if plan is None else [plan.replace("{target}", target) for target in targets]
    columns = []
    for label, policy in policies.items():
        chunks = policy.act(
            observation, key, solver=solver, plan=plans, plan_visible=plan is not None, samples=samples
        )
        paths = np.asarray(open_loop(env_config, start, chunks))
        fans = []
        for i in range(len(seeds)):
            diversity = metrics.chunk_diversity(chunks[i : i + 1], policy.action_scale)
            fans.append(
                Fan(
                    label=label,
                    image=seen(observation, "top")[i],
                    paths=env.to_pixels(paths[i]),
                    caption=f"“{observation.instruction[i]}”\n{_ways(env, i, paths[i])}, diversity {diversity:.2f}",
                )
            )
        columns.append(fans)
    return [list(row) for row in zip(*columns)]


def _ways(env: TabletopEnv, index: int, paths: Float[np.ndarray, "S k1 2"]) -> str:
    """How many paths end on either side of the line from the start to the target."""
    summary = env.scene_summary(index)
    start, goal = np.array(summary["start"]), np.array(summary["objects"][summary["target"]])
    ends = paths[:, -1] - start
    left = (goal[0] - start[0]) * ends[:, 1] - (goal[1] - start[1]) * ends[:, 0] > 0
    return f"left {int(left.sum())}, right {int((~left).sum())}"


@functools.partial(jax.jit, static_argnums=0)
def open_loop(
    config: TabletopConfig, start: Float[Array, "b 2"], chunks: Float[Array, "b S k 3"]
) -> Float[Array, "b S k1 2"]:
    """Where chunks lead from the starts [m], the start included, as if there were no obstacle."""

    def path(position, chunk):
        def advance(position, velocity):
            position = move(config, position, velocity)
            return position, position

        return jnp.concatenate([position[None], jax.lax.scan(advance, position, chunk[:, :2])[1]])

    return jax.vmap(jax.vmap(path, (None, 0)))(start, jnp.asarray(chunks))


def films(recordings: Sequence[Recording], count: int = 6) -> list[Film]:
    """Some recordings as films: failures first (at most half if there are enough successes), in their order."""
    failures = [r for r in recordings if not r.record["success"]]
    successes = [r for r in recordings if r.record["success"]]
    failures = failures[: max(count // 2, count - len(successes))]
    successes = successes[: count - len(failures)]
    return [
        Film(
            frames=r.frames,
            seconds=r.seconds,
            success=r.record["success"],
            outcome=outcome(r.record),
            instruction=r.instruction,
            plan=r.plan,
        )
        for r in [*failures, *successes]
    ]


def outcome(record: Mapping[str, Any]) -> str:
    """What became of an episode, in a few words."""
    if record["success"]:
        side = record.get("side")
        return "success" + (f", passed {side}" if side else "")
    if record.get("collision"):
        return "collision"
    reached = record.get("reached")
    return f"took the {reached}" if reached else "out of time"
