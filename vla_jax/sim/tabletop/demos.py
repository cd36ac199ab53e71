"""Whole expert episodes from seeds, ready to be written as data or trained on."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt8

from vla_jax.sim.tabletop.config import TabletopConfig
from vla_jax.sim.tabletop.episode import (
    TabletopEpisode,
    checked_seeds,
    kind_weights,
    measure,
    records,
    sample_episode,
    texts,
)
from vla_jax.sim.tabletop.expert import ExpertEpisode, rollout
from vla_jax.sim.tabletop.render import render, rgb_view
from vla_jax.sim.tabletop.world import Scene, State

FRAMES_MULTIPLE = 256
"""Pictures are rendered in multiples of this, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Expert episodes on the host, padded with zeros to a common length t = max(lengths).

    Each step holds what is seen *before* its action. `actions` are the expert's own (clean) ones, also where
    a disturbance was executed. `plans` and `instructions` hold for the whole episode.
    """

    images: dict[str, UInt8[np.ndarray, "b t h w 3"]]
    state: Float[np.ndarray, "b t q"]
    actions: Float[np.ndarray, "b t a"]
    lengths: Int[np.ndarray, " b"]
    instructions: tuple[str, ...]
    plans: tuple[str, ...]
    records: list[dict[str, Any]]


def generate(
    config: TabletopConfig,
    seeds: Sequence[int] | Integer[np.ndarray, " n"],
    *,
    kind: str | None = None,
    swapped: bool | None = None,
    scattered: bool | None = None,
) -> Demonstrations:
    """The expert's episodes of the seeds, each a pure function of its seed. 64 to 256 at a time is fast.

    `kind` fixes how the obstacle lies towards the scene's own target. `swapped` asks for another object than
    that one, `scattered` starts anywhere; None: in `config.swapped_fraction` and `config.scattered_fraction` of
    the episodes.
    """
    numbers = checked_seeds(seeds)
    episodes, run, track = jax.tree.map(
        np.asarray,
        _rollouts(
            config,
            numbers,
            kind_weights(config, kind),
            config.swapped_fraction if swapped is None else float(swapped),
            config.scattered_fraction if scattered is None else float(scattered),
        ),
    )
    lengths = run.final.steps
    live = np.arange(lengths.max()) < lengths[:, None]
    state = np.concatenate([run.states.position, run.states.opening[..., None]], axis=-1)
    instructions, plans = texts(episodes)
    return Demonstrations(
        images=_pictures(config, episodes.scene, run.states, live),
        state=np.where(live[..., None], state[:, : live.shape[1]], 0),
        actions=np.where(live[..., None], run.actions[:, : live.shape[1]], 0),
        lengths=lengths,
        instructions=instructions,
        plans=plans,
        records=records(
            config,
            seeds,
            episodes,
            track,
            success=run.final.success,
            collision=run.final.collision,
            reached=run.final.reached,
            steps=lengths,
        ),
    )


@functools.partial(jax.jit, static_argnums=0)
def _rollouts(
    config: TabletopConfig, seeds, weights, swapped_fraction, scattered_fraction
) -> tuple[TabletopEpisode, ExpertEpisode, Any]:
    fractions = jnp.stack([jnp.float32(swapped_fraction), jnp.float32(scattered_fraction)])

    def one(seed):
        swapped, scattered = jax.random.bernoulli(jax.random.fold_in(jax.random.key(seed), 1), fractions)
        episode = sample_episode(config, seed, jnp.stack(weights), swapped, scattered)
        run = rollout(config, episode.scene, episode.side, episode.disturbance)
        return episode, run, measure(config, episode, run.positions, run.final.steps)

    return jax.vmap(one)(seeds)


def _pictures(
    config: TabletopConfig, scenes: Scene, states: State, live: Bool[np.ndarray, "b t"]
) -> dict[str, UInt8[np.ndarray, "b t h w 3"]]:
    """Renders the live steps only: episodes differ in length by up to a factor of three."""
    rows, times = np.nonzero(live)
    padding = (0, -len(rows) % FRAMES_MULTIPLE)
    some_rows, some_times = np.pad(rows, padding), np.pad(times, padding)
    words = _render(
        config,
        jax.tree.map(lambda leaf: leaf[some_rows], scenes),
        jax.tree.map(lambda leaf: leaf[some_rows, some_times], states),
    )
    images = {}
    for name, packed in words.items():
        frames = rgb_view(packed)[: len(rows)]
        images[name] = np.zeros((*live.shape, *frames.shape[1:]), np.uint8)
        images[name][rows, times] = frames
    return images


@functools.partial(jax.jit, static_argnums=0)
def _render(config: TabletopConfig, scenes: Scene, states: State):
    return jax.vmap(functools.partial(render, config))(scenes, states)
