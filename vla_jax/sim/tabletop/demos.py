"""Whole expert episodes from seeds, ready to be written as data or trained on."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from vla_jax.sim.tabletop.config import TabletopConfig
from vla_jax.sim.tabletop.episode import Episode, checked_seeds, measure, records, sample_episode, texts
from vla_jax.sim.tabletop.expert import Rollout, rollout
from vla_jax.sim.tabletop.render import render

LENGTH_MULTIPLE = 8
"""Padded lengths are multiples of this, so that few programs are compiled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Expert episodes on the host, padded to a common length t; step i of episode b is real if i < lengths[b].

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


def generate(config: TabletopConfig, seeds: Sequence[int], *, kind: str | None = None) -> Demonstrations:
    """The expert's episodes of the seeds, each a pure function of its seed. 64 to 256 at a time is fast."""
    seeds = checked_seeds(seeds)
    episodes, run, track = jax.tree.map(np.asarray, _rollouts(config, seeds, kind))
    lengths = run.final.steps
    length = min(-(-int(lengths.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, config.max_steps)
    states = jax.tree.map(lambda leaf: leaf[:, :length], run.states)
    instructions, plans = texts(episodes)
    return Demonstrations(
        images={name: np.asarray(image) for name, image in _pictures(config, episodes, states).items()},
        state=np.concatenate([states.position, states.opening[..., None]], axis=-1),
        actions=run.actions[:, :length],
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


@functools.partial(jax.jit, static_argnums=(0, 2))
def _rollouts(config: TabletopConfig, seeds, kind: str | None) -> tuple[Episode, Rollout, Any]:
    def one(seed):
        episode = sample_episode(config, seed, kind=kind)
        run = rollout(config, episode.scene, episode.side, episode.disturbance)
        return episode, run, measure(config, episode, run.positions, run.final.steps)

    return jax.vmap(one)(seeds)


@functools.partial(jax.jit, static_argnums=0)
def _pictures(config: TabletopConfig, episodes: Episode, states):
    over_time = jax.vmap(functools.partial(render, config), in_axes=(None, 0))
    return jax.vmap(over_time)(episodes.scene, states)
