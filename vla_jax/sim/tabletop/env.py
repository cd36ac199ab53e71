"""The tabletop as a batch of environments (`vla_jax.sim.env.VectorEnv`)."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vla_jax.sim.env import EnvSpec
from vla_jax.sim.tabletop.config import KINDS, TabletopConfig
from vla_jax.sim.tabletop.episode import (
    TabletopEpisode,
    checked_seeds,
    kind_weights,
    measure,
    object_names,
    records,
    sample_episode,
    texts,
)
from vla_jax.sim.tabletop.expert import expert_action
from vla_jax.sim.tabletop.render import render, to_images
from vla_jax.sim.tabletop.world import State, initial_state, step
from vla_jax.types import Observation


def make_spec(config: TabletopConfig) -> EnvSpec:
    """What the tabletop shows and takes."""
    size = (config.image_size, config.image_size)
    return EnvSpec(
        name="tabletop",
        cameras={"top": size, "wrist": size},
        state_names=("x_m", "y_m", "opening"),
        action_names=("vx_m_per_s", "vy_m_per_s", "gripper_close"),
        control_hz=1 / config.dt_s,
        max_steps=config.max_steps,
        keeps=("gripper_close",),
    )


class TabletopEnv:
    """b tables in lockstep. `instruction="swapped"` asks in each scene for another object than its own target.

    `kind` fixes how the obstacles lie towards the scenes' own targets (None: drawn). With swapped instructions,
    success and everything else in `results` is judged by the object that was asked for.
    """

    def __init__(
        self,
        config: TabletopConfig = TabletopConfig(),
        *,
        instruction: Literal["own", "swapped"] = "own",
        kind: str | None = None,
    ):
        if instruction not in ("own", "swapped"):
            raise ValueError(f"instruction {instruction!r} is unknown; use own or swapped")
        if kind is not None and kind not in KINDS:
            raise ValueError(
                f"kind {kind!r} is unknown; use one of {', '.join(KINDS)}, or None for a mixture"
            )
        self.config = config
        self.spec = make_spec(config)
        self._swapped = instruction == "swapped"
        self._weights = kind_weights(config, kind)

    def reset(self, seeds: Sequence[int]) -> Observation:
        """Starts one episode per seed."""
        self._seeds = checked_seeds(seeds)
        self.episodes: TabletopEpisode = _sample(self.config, self._seeds, self._weights, self._swapped)
        """The scenes and what is asked for, as device arrays with a leading axis b."""
        self.state: State = jax.vmap(initial_state)(self.episodes.scene)
        """The robots, as device arrays with a leading axis b."""
        self.instructions, self.plans = texts(self.episodes)
        self._positions = [np.asarray(self.state.position)[:, None]]
        return self.observe()

    def advance(self, actions: Float[np.ndarray, "b k a"]) -> Observation:
        """Runs k control steps; what is done stays as it is."""
        actions = np.asarray(actions, np.float32)
        if actions.ndim != 3 or actions.shape[0] != len(self._seeds) or actions.shape[2] != 3:
            raise ValueError(f"actions of shape {actions.shape} are not [{len(self._seeds)}, k, 3]")
        if not np.isfinite(actions).all():
            raise ValueError("actions hold NaN or infinity; mend the policy that made them")
        self.state, positions = _advance(self.config, self.episodes, self.state, actions)
        self._positions.append(np.asarray(positions))
        return self.observe()

    def observe(self) -> Observation:
        """What the robots see now."""
        words, state = _observe(self.config, self.episodes, self.state)
        return Observation(
            images={**to_images(words)},
            state=np.asarray(state),
            instruction=self.instructions,
        )

    @property
    def done(self) -> Bool[np.ndarray, " b"]:
        """Which episodes have ended."""
        return np.asarray(self.state.done)

    @property
    def positions(self) -> Float[np.ndarray, "b t 2"]:
        """Positions [m] at reset and after every step so far; the last one is repeated after the end."""
        return np.concatenate(self._positions, axis=1)

    def results(self) -> list[dict[str, Any]]:
        """One record per episode, measured up to now (see `episode.records` for its keys)."""
        state = jax.tree.map(np.asarray, self.state)
        moves = self.config.max_steps + 1
        positions = self.positions[:, :moves]
        positions = np.pad(positions, ((0, 0), (0, moves - positions.shape[1]), (0, 0)), mode="edge")
        track = jax.tree.map(np.asarray, _measure(self.config, self.episodes, positions, state.steps))
        return records(
            self.config,
            self._seeds,
            self.episodes,
            track,
            success=state.success,
            collision=state.collision,
            reached=state.reached,
            steps=state.steps,
        )

    def expert_actions(self) -> Float[np.ndarray, "b 3"]:
        """What the expert would do now, on the side that it chose at the start."""
        return np.asarray(_expert(self.config, self.episodes, self.state))

    def to_pixels(
        self, xy: Float[np.ndarray, "*any 2"] | Float[Array, "*any 2"]
    ) -> Float[np.ndarray, "*any 2"]:
        """Positions [m] to (column, row) in the top image; pixel (i, j) has its centre at (i + ½, j + ½)."""
        per_metre = self.config.image_size / self.config.table_m
        xy = np.asarray(xy)
        return np.stack([xy[..., 0], self.config.table_m - xy[..., 1]], axis=-1) * per_metre

    def scene_summary(self, index: int) -> dict[str, Any]:
        """The index-th scene in plain numbers and words, for captions and logs."""
        one = jax.tree.map(lambda leaf: np.asarray(leaf[index]), self.episodes)
        names = object_names(self.episodes.scene)[index]
        return {
            "seed": int(self._seeds[index]),
            "kind": KINDS[int(one.kind)],
            "instruction": self.instructions[index],
            "plan": self.plans[index],
            "target": names[int(one.scene.target)],
            "objects": {name: tuple(map(float, xy)) for name, xy in zip(names, one.scene.objects)},
            "obstacle": tuple(map(float, one.scene.obstacle)),
            "obstacle_radius_m": float(one.scene.obstacle_radius),
            "start": tuple(map(float, one.scene.start)),
        }


@functools.partial(jax.jit, static_argnums=0)
def _sample(config: TabletopConfig, seeds, weights, swapped) -> TabletopEpisode:
    return jax.vmap(lambda seed: sample_episode(config, seed, jnp.stack(weights), swapped))(seeds)


@functools.partial(jax.jit, static_argnums=0)
def _advance(config: TabletopConfig, episodes: TabletopEpisode, state: State, actions: Float[Array, "b k 3"]):
    def one(state, action):
        state = jax.vmap(functools.partial(step, config))(episodes.scene, state, action)
        return state, state.position

    state, positions = jax.lax.scan(one, state, jnp.swapaxes(actions, 0, 1))
    return state, jnp.swapaxes(positions, 0, 1)


@functools.partial(jax.jit, static_argnums=0)
def _observe(config: TabletopConfig, episodes: TabletopEpisode, state: State):
    return jax.vmap(functools.partial(render, config))(episodes.scene, state), jax.vmap(lambda s: s.vector)(
        state
    )


@functools.partial(jax.jit, static_argnums=0)
def _measure(config: TabletopConfig, episodes: TabletopEpisode, positions, steps):
    return jax.vmap(functools.partial(measure, config))(episodes, positions, steps)


@functools.partial(jax.jit, static_argnums=0)
def _expert(config: TabletopConfig, episodes: TabletopEpisode, state: State):
    return jax.vmap(functools.partial(expert_action, config))(episodes.scene, state, episodes.side)
