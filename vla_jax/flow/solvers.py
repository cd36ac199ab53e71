"""Explicit Runge-Kutta solvers of ``dx/dt = field(x, t)``: six tableaus, one scan over a static step count.

Sources: Hairer, Norsett, Wanner, Solving ODEs I, section II.1. Everything is jit-, vmap- and grad-clean; the
number of evaluations is ``steps * stages``, known before anything runs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vla_jax.flow.paths import align, time_dtype
from vla_jax.types import PyTree

Field = Callable[..., Float[Array, "b ..."]]
"""(x [b …], t [b]) → prediction [b …]; see `integrate` for a third argument."""


class Tableau(NamedTuple):
    """Butcher tableau: stage times c, stage weights a (a row per later stage), final weights b."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


TABLEAUS = {
    "euler": Tableau(c=(0.0,), a=(), b=(1.0,)),
    "midpoint": Tableau(c=(0.0, 0.5), a=((0.5,),), b=(0.0, 1.0)),
    # The trapezoidal rule, in some papers "improved Euler"; "heun2" in torchdiffeq.
    "heun": Tableau(c=(0.0, 1.0), a=((1.0,),), b=(0.5, 0.5)),
    "heun3": Tableau(c=(0.0, 1 / 3, 2 / 3), a=((1 / 3,), (0.0, 2 / 3)), b=(0.25, 0.0, 0.75)),
    "rk4": Tableau(
        c=(0.0, 0.5, 0.5, 1.0),
        a=((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
    # Kutta's 3/8 rule: what torchdiffeq, and so Meta's ODESolver, calls "rk4".
    "rk38": Tableau(
        c=(0.0, 1 / 3, 2 / 3, 1.0),
        a=((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}


class Solution(NamedTuple):
    """The end of a solve and, on request, every point on the way, the start included."""

    x: Float[Array, "b ..."]
    trajectory: Float[Array, "n b ..."] | None


def time_grid(name: str, num_steps: int) -> Float[np.ndarray, " n"]:
    """``num_steps + 1`` increasing times from 0 to 1.

    edm: noise levels ``sigma / alpha`` of Karras et al. 2022 (2206.00364, eq. 5, rho 7, from 80 to 0.002) on
    the CondOT path, ``t = 1 / (1 + level)``; the first is moved to t = 0, which is pure noise.
    """
    if name == "uniform":
        return np.linspace(0.0, 1.0, num_steps + 1)
    ramp = np.linspace(0.0, 1.0, num_steps) if num_steps > 1 else np.zeros(1)
    level = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    return np.concatenate([[0.0], 1 / (1 + level[1:]), [1.0]])


def stage_times(name: str, num_steps: int, method: str) -> Float[np.ndarray, "n stages"]:
    """When `integrate` looks at the field on a grid of `time_grid`, to the last bit of float32.

    The last bit counts: a network's embedding of the time may turn by over a thousand rad from 0 to 1.
    """
    times = time_grid(name, num_steps).astype(np.float32)
    return times[:-1, None] + np.asarray(TABLEAUS[method].c, np.float32) * np.diff(times)[:, None]


def integrate(
    field: Field,
    x: Float[Array, "b ..."],
    times: Float[Array, "n *t"] | Float[np.ndarray, "n *t"],
    *,
    method: str = "euler",
    unroll: int = 1,
    intermediates: bool = False,
    stages: PyTree = None,
) -> Solution:
    """Carry `x` from times[0] to times[-1], one step between neighbours; backwards if the times fall.

    times [n] are shared by the batch and reach the field as [b]; times [n b] or [n b k] give every sample
    (or token) its own. The state keeps the dtype of `x`; the field may return another.

    `stages`: arrays with leading axes [steps, stages], of which the field is given an entry as a third argument: what a
    network knows of the times before it is evaluated (`stage_times`).
    """
    tableau = TABLEAUS[method]
    times = jnp.asarray(times, time_dtype(x.dtype))
    if times.ndim == 1:
        times = jnp.broadcast_to(times[:, None], (times.shape[0], x.shape[0]))

    def step(x, interval):
        start, end, known = interval
        dt = end - start
        h = align(dt, x)

        def slope(stage: int, x: Array, t: Array) -> Array:
            return (
                field(x, t) if stages is None else field(x, t, jax.tree.map(lambda leaf: leaf[stage], known))
            )

        slopes = [slope(0, x, start)]
        for stage, row in enumerate(tableau.a, start=1):
            moved = sum(w * k for w, k in zip(row, slopes) if w)
            slopes.append(slope(stage, (x + h * moved).astype(x.dtype), start + tableau.c[stage] * dt))
        x = (x + h * sum(w * k for w, k in zip(tableau.b, slopes) if w)).astype(x.dtype)
        return x, (x if intermediates else None)

    end, path = jax.lax.scan(step, x, (times[:-1], times[1:], stages), unroll=unroll)
    return Solution(end, None if path is None else jnp.concatenate([x[None], path]))
