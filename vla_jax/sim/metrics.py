"""What is counted over episodes: success with an interval, sides taken, how far sampled chunks lie apart."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

Z_95 = 1.959963984540054
"""The standard normal's 97.5 % quantile: a two-sided interval of 95 %."""


class ConfidenceInterval(NamedTuple):
    """Bounds of a share, both in [0, 1]."""

    low: float
    high: float


def wilson(successes: int, trials: int, z: float = Z_95) -> ConfidenceInterval:
    """Wilson's score interval of a binomial share (Wilson 1927, eq. 1), meaningful at 0 % and 100 % too.

    The bounds are the two roots p of ``(successes/trials - p)² = z² p (1-p) / trials``.
    Raises ValueError without trials, or with more successes than trials.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(
            f"{successes} successes in {trials} trials: give 0 <= successes <= trials, trials > 0"
        )
    share = successes / trials
    centre = share + z**2 / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    # At the ends one root is exactly 0 or 1; rounding would leave 1e-17 beside it.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == trials else (centre + half) / scale
    return ConfidenceInterval(low, high)


class Sides(NamedTuple):
    """How often a policy passed on each side where both are equally good."""

    left_share: float
    entropy_bits: float
    """0: always the same side; 1: both equally often."""
    episodes: int


def sides(taken: Iterable[str]) -> Sides | None:
    """Counts "left" and "right"; episodes that took neither (stuck, collided head-on) are left out.

    None where no episode took a side at all.
    """
    counts = {"left": 0, "right": 0}
    for side in taken:
        if side in counts:
            counts[side] += 1
    total = sum(counts.values())
    if total == 0:
        return None
    shares = [count / total for count in counts.values()]
    entropy = -sum(share * math.log2(share) for share in shares if share > 0)
    return Sides(shares[0], entropy, total)


def chunk_diversity(chunks: Float[np.ndarray, "b S k a"], scale: Float[np.ndarray, " a"]) -> float:
    """Mean distance between two chunks sampled for the same observation, in units of `scale` per dimension.

    A pair's distance is the root mean square over steps and dimensions, so that with `scale` = the standard
    deviation of the actions 0 means a deterministic policy and √2 independent noise. Dimensions of scale 0 never change
    in the data: they have no such unit and are left out. Needs S >= 2 samples.
    """
    samples = chunks.shape[1]
    if samples < 2:
        raise ValueError(f"chunk diversity needs at least 2 samples per observation, got {samples}")
    moves = np.asarray(scale) > 0
    if not moves.any():
        return 0.0
    scaled = np.asarray(chunks, np.float64)[..., moves] / np.asarray(scale)[moves]
    first, second = np.triu_indices(samples, k=1)
    distance = np.sqrt(np.mean((scaled[:, first] - scaled[:, second]) ** 2, axis=(-2, -1)))
    return float(distance.mean())


class Smoothness(NamedTuple):
    """How evenly a robot was driven in one episode; None where it was too short to say."""

    jerk: float | None
    """Root mean square of the second difference of the rates over time², per dimension: for velocities, m/s³."""
    switch_jump: float | None
    """Mean distance between the actions before and after a new chunk takes over."""
    step_jump: float | None
    """The same between all other neighbours."""


def smoothness(
    rates: Float[np.ndarray, "b t a"], steps: Sequence[int], switches: Sequence[int], control_hz: float
) -> list[Smoothness]:
    """Of executed actions that are rates (velocities, displacements); episode i has run the first `steps[i]`.

    `switches`: the steps whose action is the first of a new chunk.
    """
    found = []
    for episode, end in zip(np.asarray(rates, np.float64), steps):
        run = episode[:end]
        jumps = np.linalg.norm(np.diff(run, axis=0), axis=1)
        at_switch = np.isin(np.arange(1, end), switches)
        bends = np.diff(run, n=2, axis=0) * control_hz**2
        found.append(
            Smoothness(
                float(np.sqrt(np.mean(bends**2))) if bends.size else None,
                float(jumps[at_switch].mean()) if at_switch.any() else None,
                float(jumps[~at_switch].mean()) if (~at_switch).any() else None,
            )
        )
    return found


def mean_of(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Mean of `key` over the records whose value is not None; None where there is no such record."""
    values = [float(record[key]) for record in records if record.get(key) is not None]
    return float(np.mean(values)) if values else None


def success_summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``{episodes, success, success_ci}`` of some episodes' records."""
    wins = sum(bool(record["success"]) for record in records)
    return {
        "episodes": len(records),
        "success": wins / len(records),
        "success_ci": list(wilson(wins, len(records))),
    }


def per_task(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Task → success summary, in the order in which the tasks first appear."""
    return {task: success_summary(group) for task, group in group_by(records, "task").items()}


def per_group(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Difficulty group → success summary with `tasks`, and `success_tasks`: the mean over its tasks.

    The two agree when every task has as many episodes. Records without a `group` are left out.
    """
    summaries = {}
    for name, group in group_by([r for r in records if r.get("group")], "group").items():
        tasks = per_task(group)
        summaries[name] = success_summary(group) | {
            "tasks": len(tasks),
            "success_tasks": float(np.mean([task["success"] for task in tasks.values()])),
        }
    return summaries


def group_by(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    """Records by the value of `key`, in order of first appearance."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    return groups
