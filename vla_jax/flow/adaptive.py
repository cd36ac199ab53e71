"""Adaptive Runge-Kutta methods, by diffrax (an optional dependency, imported when first used)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vla_jax.flow.paths import time_dtype
from vla_jax.flow.solvers import Field

MAX_STEPS = 4096


def integrate_adaptive(
    field: Field,
    x: Float[Array, "b ..."],
    times: Float[np.ndarray, " n"],
    *,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    intermediates: bool = False,
) -> tuple[Float[Array, "b ..."], Int[Array, ""], Float[Array, "n b ..."] | None]:
    """(end, evaluations, points at `times` if asked for), with steps chosen from the error of an embedded method.

    One step size for the whole batch, from the root-mean-square error over it: a sample's result depends, within
    the tolerance, on what it is batched with. Raises at run time at the first value that is not finite, and after 4096
    steps. Differentiable in reverse.
    """
    try:
        import diffrax
        import equinox

        from vla_jax.flow.stop_early import NOT_FINITE, StopEarly
    except ImportError as error:
        raise ImportError(f"solver.method {method} needs diffrax; pip install diffrax") from error
    rk = {"dopri5": diffrax.Dopri5, "tsit5": diffrax.Tsit5}[method]()
    dtype = time_dtype(x.dtype)
    start, end = float(times[0]), float(times[-1])
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, _: field(y, jnp.full(y.shape[:1], t, dtype)).astype(dtype)),
        rk,
        t0=start,
        t1=end,
        dt0=(end - start) / 20,  # a step may grow tenfold; too long a first one costs six evaluations
        y0=x.astype(dtype),
        stepsize_controller=StopEarly(rtol=rtol, atol=atol),
        saveat=diffrax.SaveAt(ts=jnp.asarray(times, dtype)) if intermediates else diffrax.SaveAt(t1=True),
        max_steps=MAX_STEPS,
        throw=False,
    )
    points = equinox.error_if(
        solution.ys,
        solution.result == NOT_FINITE,
        f"solver.method {method}: the network's answer, or the step made of it, is NaN or infinite; the parameters or "
        "what they are given are not finite",
    )
    points = equinox.error_if(
        points,
        (solution.result != NOT_FINITE) & (solution.result != diffrax.RESULTS.successful),
        f"solver.method {method} has not arrived after {MAX_STEPS} steps; raise solver.rtol and solver.atol, or use a "
        "method of fixed steps",
    )
    # Seven stages, of which the first is the last one of the step before: six an attempt, and one to start.
    nfe = 6 * solution.stats["num_steps"] + 1
    points = points.astype(x.dtype)
    return points[-1], nfe, points if intermediates else None
