"""What a network can predict about ``x = alpha x1 + sigma eps``, and how each follows from each other.

| kind     | is                                              |
|----------|-------------------------------------------------|
| velocity | alpha' x1 + sigma' eps                          |
| x1       | the data                                        |
| eps      | the noise                                       |
| score    | grad log p_t(x) = -eps / sigma                  |
| v        | alpha eps - sigma x1 (Salimans & Ho 2202.00512) |

All are read as conditional expectations given x, between which these linear maps hold (Lipman et al. 2412.06264,
table 1). Some do not exist at an end: at pure noise, eps says nothing about x1; at pure data, x1 says nothing
about eps. `undefined` is the table of these; there, `convert` raises when t is concrete, and inside jit, where it
cannot look at t, the result is inf or NaN. Everywhere else the formula used is finite.
"""

from typing import Literal

import jax
import jax.core
import numpy as np
from jaxtyping import Array, Float

from vla_jax.flow.paths import align
from vla_jax.flow.schedules import Schedule

Kind = Literal["velocity", "eps", "x1", "score", "v"]


def undefined(schedule: Schedule, source: Kind, target: Kind) -> tuple[float, ...]:
    """The ends, of (0, 1), at which `target` does not follow from `source` and x."""
    if source == target:
        return ()
    ends = []
    blind = (schedule.pure_noise and source in ("eps", "score")) or (
        schedule.lost_start and source == "velocity"
    )
    if blind and target in ("x1", "velocity", "v"):
        ends.append(0.0)
    if source == "x1":
        ends.append(1.0)
    elif source in ("eps", "v"):
        if target == "score" or (target == "velocity" and schedule.infinite_end):
            ends.append(1.0)
    elif source == "velocity" and target == "score" and not schedule.infinite_end:
        ends.append(1.0)
    return tuple(ends)


def data_and_noise(
    schedule: Schedule, kind: Kind, value: Float[Array, "..."], x: Float[Array, "..."], t: Float[Array, "*t"]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(x1, eps) from a prediction; t as [], [b] or [b k] against x."""
    u = align(t, x)
    alpha, sigma = schedule.alpha(u), schedule.sigma(u)
    if kind == "velocity":
        return schedule.pair_of_velocity(value, x, u)
    if kind == "x1":
        return value, (x - alpha * value) / sigma
    if kind == "v":
        norm = alpha**2 + sigma**2
        return (alpha * x - sigma * value) / norm, (sigma * x + alpha * value) / norm
    eps = value if kind == "eps" else -sigma * value
    return (x - sigma * eps) / alpha, eps


def convert(
    schedule: Schedule,
    source: Kind,
    target: Kind,
    value: Float[Array, "..."],
    x: Float[Array, "..."],
    t: Float[Array, "*t"],
) -> Float[Array, "..."]:
    """`target` at (x, t) from a prediction of kind `source`. ValueError at an end where it does not exist."""
    if source == target:
        return value
    if not isinstance(t, jax.core.Tracer):
        for end in undefined(schedule, source, target):
            if np.any(np.asarray(t) == end):
                raise ValueError(f"{source} does not determine {target} at t = {end:g} on {schedule}")
    u = align(t, x)
    if source == "velocity" and target == "score" and schedule.infinite_end:
        # -eps / sigma with sigma' eliminated by alpha^2 + sigma^2 = 1, which cancels sigma.
        return schedule.alpha(u) / schedule.d_alpha(u) * value - x
    if source == "score" and target == "velocity":
        x1, _ = data_and_noise(schedule, source, value, x, t)
        return schedule.d_alpha(u) * x1 - schedule.sigma_d_sigma(u) * value
    if target == "eps" and source == "score":
        return -schedule.sigma(u) * value
    if target == "score" and source == "eps":
        return -value / schedule.sigma(u)
    return from_data_and_noise(schedule, target, *data_and_noise(schedule, source, value, x, t), t)


def from_data_and_noise(
    schedule: Schedule,
    kind: Kind,
    x1: Float[Array, "..."],
    eps: Float[Array, "..."],
    t: Float[Array, "*t"],
) -> Float[Array, "..."]:
    """The quantity of this kind for a known pair: the target of training."""
    if kind == "x1":
        return x1
    if kind == "eps":
        return eps
    u = align(t, eps)
    if kind == "velocity":
        return schedule.d_alpha(u) * x1 + schedule.d_sigma(u) * eps
    if kind == "score":
        return -eps / schedule.sigma(u)
    return schedule.alpha(u) * eps - schedule.sigma(u) * x1
