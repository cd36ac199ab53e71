"""One episode's draws from its seed, and its record: everything random is decided here."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, UInt32

from vla_jax.sim.tabletop.config import KINDS, TabletopConfig
from vla_jax.sim.tabletop.expert import choose_side, rollout, sample_disturbance
from vla_jax.sim.tabletop.geometry import LEFT, RIGHT, segment_distance
from vla_jax.sim.tabletop.language import PHRASINGS, instruction_text, object_name, plan_text
from vla_jax.sim.tabletop.world import (
    OBJECTS,
    Scene,
    clearance,
    pick,
    sample_scene,
    scattered_start,
    scene_kind,
)

SIDE_NAMES = {LEFT: "left", RIGHT: "right"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TabletopEpisode:
    """A scene, what is asked for in it, and the expert's choice of side (`kind` indexes KINDS).

    `scene.target` is the object of the instruction, `own_target` the one that the scene was laid out for.
    """

    scene: Scene
    own_target: Int[Array, ""]
    kind: Int[Array, ""]
    phrasing: Int[Array, ""]
    side: Int[Array, ""]
    disturbance: Float[Array, "t 2"]


def kind_weights(config: TabletopConfig, kind: str | None) -> tuple[float, ...]:
    """Weights of KINDS that fix one kind, or the configured ones for None."""
    if kind is None:
        return config.kind_weights
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; use one of {', '.join(KINDS)}, or None for a mixture")
    return tuple(float(kind == name) for name in KINDS)


def sample_episode(
    config: TabletopConfig,
    seed: Integer[Array, ""],
    weights: Float[Array, "3"] | tuple[float, ...],
    swapped: Bool[Array, ""] | bool,
    scattered: Bool[Array, ""] | bool = False,
) -> TabletopEpisode:
    """Draws the episode of a seed; `weights` are those of KINDS, towards the scene's own target.

    `swapped` asks for another object in the very same scene, `scattered` starts anywhere on the table; kind and
    side are then about that object and from there.
    """
    scene_key, noise_key, rest = jax.random.split(jax.random.key(seed), 3)
    kind, phrasing, coin, swap = jax.random.uniform(rest, (4,))
    shares = jnp.cumsum(jnp.asarray(weights, jnp.float32))
    scene = sample_scene(config, scene_key, jnp.sum(kind * shares[-1] >= shares[:-1]))
    own_target = scene.target
    other = (own_target + 1 + pick(swap, OBJECTS - 1)) % OBJECTS
    start = scattered_start(config, jax.random.fold_in(scene_key, 1), scene)
    scene = dataclasses.replace(
        scene,
        target=jnp.where(swapped, other, own_target),
        start=jnp.where(scattered, start, scene.start),
    )
    return TabletopEpisode(
        scene=scene,
        own_target=own_target,
        kind=scene_kind(config, scene),
        phrasing=pick(phrasing, len(PHRASINGS)),
        side=choose_side(config, scene, coin < 0.5),
        disturbance=sample_disturbance(config, noise_key),
    )


def checked_seeds(seeds: Sequence[int] | Integer[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """Seeds as uint32; refuses what would silently wrap round."""
    found = np.asarray(seeds, dtype=np.int64)
    if found.ndim != 1 or found.size == 0:
        raise ValueError(f"seeds of shape {found.shape} are not a non-empty list; pass e.g. range(64)")
    if found.min() < 0 or found.max() >= 2**32:
        raise ValueError(f"seed {found.min() if found.min() < 0 else found.max()} is not in [0, 2**32)")
    return found.astype(np.uint32)


def object_names(scene: Scene) -> list[tuple[str, ...]]:
    """Names of the three objects of each scene in a batch (on the host)."""
    colours, shapes = np.asarray(scene.colours), np.asarray(scene.shapes)
    return [tuple(map(object_name, *pair)) for pair in zip(colours, shapes)]


def texts(episodes: TabletopEpisode) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Instructions and plans of a batch of episodes (on the host). The plan of a clear scene names no side."""
    names = [
        row[target] for row, target in zip(object_names(episodes.scene), np.asarray(episodes.scene.target))
    ]
    instructions = tuple(map(instruction_text, np.asarray(episodes.phrasing), names))
    clear = np.asarray(episodes.kind) == KINDS.index("clear")
    sides = [None if free else SIDE_NAMES[int(side)] for free, side in zip(clear, np.asarray(episodes.side))]
    places = [
        float(row[target])
        for row, target in zip(np.asarray(episodes.scene.objects)[..., 0], np.asarray(episodes.scene.target))
    ]
    return instructions, tuple(map(plan_text, sides, names, places))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Track:
    """What a trajectory looks like afterwards. `side` is LEFT or RIGHT of the obstacle, or 0: never passed."""

    side: Int[Array, ""]
    path_length_m: Float[Array, ""]
    path_error_m: Float[Array, ""]
    min_clearance_m: Float[Array, ""]


def measure(
    config: TabletopConfig,
    episode: TabletopEpisode,
    positions: Float[Array, "points 2"],
    steps: Int[Array, ""],
) -> Track:
    """Measures the first `steps` moves of a trajectory (later positions are ignored).

    The side is where it last crossed the horizontal line through the obstacle's centre, upwards. The path
    error is the mean distance of its positions to the undisturbed expert's path on the side taken (on the
    expert's own side where none was taken, or where the way is free).
    """
    scene = episode.scene
    before, after = positions[:-1], positions[1:]
    moved = jnp.arange(len(before)) < steps
    rise = scene.obstacle[1] - before[:, 1]
    crosses = moved & (rise > 0) & (after[:, 1] >= scene.obstacle[1])
    share = rise / jnp.where(crosses, after[:, 1] - before[:, 1], 1)
    crossing_x = before[:, 0] + share * (after[:, 0] - before[:, 0])
    last = jnp.max(jnp.where(crosses, jnp.arange(len(before)), -1))
    side = jnp.where(crossing_x[last] < scene.obstacle[0], LEFT, RIGHT) * (last >= 0)

    lengths = jnp.linalg.norm(after - before, axis=1)
    rooms = jax.vmap(lambda start, end: clearance(config, scene, start, end))(before, after)
    taken = (side != 0) & (episode.kind != KINDS.index("clear"))
    path = expert_path(config, scene, jnp.where(taken, side, episode.side))
    to_path = jax.vmap(lambda p: jnp.min(jax.vmap(segment_distance, (None, 0, 0))(p, path[:-1], path[1:])))
    visited = jnp.arange(len(positions)) <= steps
    return Track(
        side=side,
        path_length_m=jnp.sum(lengths * moved),
        path_error_m=jnp.sum(to_path(positions) * visited) / (steps + 1),
        min_clearance_m=jnp.min(jnp.where(moved, rooms, clearance(config, scene, scene.start, scene.start))),
    )


def expert_path(config: TabletopConfig, scene: Scene, side: Int[Array, ""]) -> Float[Array, "points 2"]:
    """Positions of the undisturbed expert, the last one repeated after its end."""
    return rollout(config, scene, side, jnp.zeros((config.max_steps, 2))).positions


def records(
    config: TabletopConfig,
    seeds,
    episodes: TabletopEpisode,
    track: Track,
    *,
    success: Bool[np.ndarray, " b"],
    collision: Bool[np.ndarray, " b"],
    reached: Int[np.ndarray, " b"],
    steps: Int[np.ndarray, " b"],
) -> list[dict]:
    """One plain dictionary per episode, ready for JSON. A clear scene has no side."""
    names = object_names(episodes.scene)
    target, own_target = np.asarray(episodes.scene.target), np.asarray(episodes.own_target)
    out = []
    for i, seed in enumerate(seeds):
        kind = KINDS[int(episodes.kind[i])]
        out.append(
            {
                "seed": int(seed),
                "task": "tabletop",
                "kind": kind,
                "target": names[i][target[i]],
                "own_target": names[i][own_target[i]],
                "reached": names[i][reached[i]] if reached[i] >= 0 else None,
                "success": bool(success[i]),
                "collision": bool(collision[i]),
                "side": None if kind == "clear" else SIDE_NAMES.get(int(track.side[i])),
                "path_length_m": float(track.path_length_m[i]),
                "path_error_m": float(track.path_error_m[i]),
                "min_clearance_m": float(track.min_clearance_m[i]),
                "steps": int(steps[i]),
                "time_s": float(steps[i] * config.dt_s),
            }
        )
    return out
