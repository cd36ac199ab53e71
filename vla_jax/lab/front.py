"""How losses trade off: the Pareto front, what it dominates, and what a policy loses against the best fixed λ.

All of it is done on log(loss), because the losses have different units and range over decades. With lo and hi the
smallest and the largest seed mean among the fixed λ > 0 (at κ = 1, where there are any), a loss L counts as

    u(L) = clip((log L - log lo) / (log hi - log lo), 0, 1)        0: as good, 1: as bad as any fixed λ

- **hypervolume** of points (u_text, u_action, …): the share of the unit square, or cube, that they dominate (Zitzler &
  Thiele 1999).
- **cost** of a point: the mean of its u. **Regret** of a policy: its cost minus that of the best fixed λ, the one
  of the lowest mean cost, paired by seed. That λ is chosen with the results at hand, which no user has before the
  sweep: a regret of 0 is a success of the policy.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from vla_jax.lab.columns import losses_of
from vla_jax.lab.table import Mean, Setting, mean_of


def pareto(points: Float[np.ndarray, "n losses"]) -> list[int]:
    """Indices of the points that no other one is at least as good as in all and better in one; lower is better."""
    points = np.asarray(points, float)

    def dominated(i: int) -> bool:
        no_worse = (points <= points[i]).all(axis=1)
        better = (points < points[i]).any(axis=1)
        return bool((no_worse & better).any())

    return [i for i in range(len(points)) if not dominated(i)]


def pareto_settings(settings: Sequence[Setting]) -> list[Setting]:
    """Settings than which no other one has smaller seed means of all losses."""
    names = losses_of(settings)
    if len(names) < 2:
        return []
    full = _with_all(settings, names)
    points = np.array([[s.known(name).mean for name in names] for s in full]).reshape(-1, len(names))
    return [full[i] for i in pareto(points)]


def hypervolume(points: Float[np.ndarray, "*n losses"]) -> float:
    """The share of the unit cube that is at least as bad as some point, or the one, in all losses; lower is better.

    Cut into slices at the points' last coordinates: in each, what the points below it dominate of the other losses.
    """
    points = np.clip(np.atleast_2d(np.asarray(points, float)), 0, 1)
    if points.shape[1] == 1:
        return float(1 - points.min(initial=1))
    points = points[np.argsort(points[:, -1])]
    heights = np.diff(points[:, -1], append=1)
    return sum(h * hypervolume(points[: i + 1, :-1]) for i, h in enumerate(heights) if h > 0)


@dataclasses.dataclass(frozen=True)
class Scale:
    """u of every loss."""

    names: tuple[str, ...]
    """The losses' columns."""
    low: Float[np.ndarray, " losses"]
    high: Float[np.ndarray, " losses"]

    def __call__(self, setting: Setting) -> Float[np.ndarray, "seeds losses"]:
        """(u_text, u_action, …) of each seed."""
        losses = np.array([[row.metric(name) for name in self.names] for row in setting.rows], float)
        return np.clip((np.log(losses) - self.low) / (self.high - self.low), 0, 1)


class Verdict(NamedTuple):
    """A policy beside the fixed λ."""

    setting: Setting
    hypervolume: Mean
    """Hypervolume of its one point, over the seeds."""
    regret: Mean | None
    """None where no seed is shared with the best fixed λ."""
    success_regret: Mean | None
    """Success of the fixed λ with the highest mean success, minus its own; None without a simulator."""


class Verdicts(NamedTuple):
    """All policies beside the fixed λ."""

    scale: Scale
    best: Setting
    """The fixed λ of the lowest cost."""
    most_successful: Setting | None
    front: Mean | None
    """Hypervolume of all fixed λ together; None where they share no seed."""
    fixed: list[Verdict]
    policies: list[Verdict]


def fixed_settings(settings: Sequence[Setting]) -> list[Setting]:
    """Fixed λ > 0 with all losses, at the largest κ there is."""
    found = [s for s in _with_all(settings, losses_of(settings)) if s.policy == "fixed"]
    kappa = max((s.kappa for s in found), default=1.0)
    return sorted((s for s in found if s.kappa == kappa), key=lambda s: s.weight)


def judge(settings: Sequence[Setting]) -> Verdicts | None:
    """Compares all policies with the fixed λ of the same κ; None where fewer than two fixed λ differ."""
    fixed, names = fixed_settings(settings), losses_of(settings)
    if len(fixed) < 2 or len(names) < 2:
        return None
    means = np.log([[s.known(name).mean for name in names] for s in fixed])
    if (means.min(axis=0) == means.max(axis=0)).any():
        return None
    scale = Scale(names, means.min(axis=0), means.max(axis=0))
    others = [s for s in settings if s.policy != "fixed" and s.kappa == fixed[0].kappa]
    others = _with_all(others, names)
    best = min(fixed, key=lambda s: scale(s).mean())
    able = [s for s in fixed if s.mean("success")]
    winner = max(able, key=lambda s: s.known("success").mean) if able else None

    points = {id(s): dict(zip(s.seeds, scale(s))) for s in [*fixed, *others]}

    def verdict(setting: Setting) -> Verdict:
        own, reference = points[id(setting)], points[id(best)]
        regret = [own[seed].mean() - reference[seed].mean() for seed in _shared(setting, best)]
        lost = None
        if winner and setting.mean("success") and (seeds := _shared(setting, winner)):
            most, found = (dict(zip(s.seeds, s.known("success").values)) for s in (winner, setting))
            lost = mean_of(most[seed] - found[seed] for seed in seeds)
        return Verdict(
            setting, mean_of(hypervolume(p) for p in own.values()), mean_of(regret) if regret else None, lost
        )

    together = [
        hypervolume(np.stack([points[id(s)][seed] for s in fixed])) for seed in _shared(*fixed)
    ]  # a seed counts where every λ has it
    return Verdicts(
        scale,
        best,
        winner,
        mean_of(together) if together else None,
        [verdict(s) for s in fixed],
        [verdict(s) for s in others],
    )


class Apart(NamedTuple):
    """How far a setting's losses lie above the smallest ones of any fixed λ, as factors minus one."""

    setting: Setting
    losses: dict[str, Mean | None]
    """Geometric means, paired by seed; None where no seed is shared."""


def apart(settings: Sequence[Setting]) -> list[Apart]:
    """Every setting beside the fixed λ > 0 of the smallest mean loss (a different one for each loss).

    Seeds differ more than settings do, and in the same direction everywhere: paired by seed, three of them tell
    differences that the intervals of the losses themselves hide. Empty without a fixed λ of all losses.
    """
    names = losses_of(settings)
    fixed = [s for s in _with_all(settings, names) if s.policy == "fixed"]
    if not fixed or len(names) < 2:
        return []
    best = {name: min(fixed, key=lambda s: s.known(name).mean) for name in names}

    def beside(setting: Setting, name: str) -> Mean | None:
        seeds = _shared(setting, best[name])
        if not setting.mean(name) or not seeds:
            return None
        own, least = (dict(zip(s.seeds, np.log(s.known(name).values))) for s in (setting, best[name]))
        mean, low, high, values = mean_of(own[seed] - least[seed] for seed in seeds)
        mean, low, high = map(math.expm1, (mean, low, high))
        return Mean(mean, low, high, tuple(map(math.expm1, values)))

    return [Apart(s, {name: beside(s, name) for name in names}) for s in settings]


def _with_all(settings: Sequence[Setting], names: Sequence[str]) -> list[Setting]:
    """The settings that have all of the losses."""
    return [s for s in settings if all(s.mean(name) for name in names)]


def _shared(*settings: Setting) -> list[int]:
    """Seeds that all of them have: the others of an unfinished sweep have nothing to be compared with."""
    return sorted(set.intersection(*(set(s.seeds) for s in settings)))
