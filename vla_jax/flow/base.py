"""What all processes share: the shape of a training example, of a result, and of a loss."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from vla_jax.flow.adaptive import integrate_adaptive
from vla_jax.flow.config import ADAPTIVE, SolverConfig
from vla_jax.flow.paths import time_dtype
from vla_jax.flow.solvers import Field, integrate, time_grid
from vla_jax.types import PyTree


class Corrupted(NamedTuple):
    """Training examples of a field: its input (x_t, t), what it should answer, and the noise used."""

    x_t: Float[Array, "b ..."]
    t: Float[Array, "b *k"]
    target: Float[Array, "b ..."]
    noise: Float[Array, "b ..."]


class Samples(NamedTuple):
    """What a solver made, the evaluations of the field it took, and the points on the way if asked for."""

    x: Float[Array, "b ..."]
    nfe: int | Int[Array, ""]
    trajectory: Float[Array, "n b ..."] | None = None


def noise_and_time(
    key: Key[Array, ""],
    a: Float[Array, "b ..."],
    times: Callable[[Key[Array, ""], int, DTypeLike], Float[Array, " b"]],
    noise: Float[Array, "b ..."] | None,
    t: Float[Array, "b *k"] | None,
) -> tuple[Float[Array, "b ..."], Float[Array, "b *k"]]:
    """The noise and the times of a training batch `a`, each drawn from its own part of `key` unless given."""
    for_noise, for_time = jax.random.split(key)
    noise = jax.random.normal(for_noise, a.shape, a.dtype) if noise is None else noise
    return noise, times(for_time, a.shape[0], time_dtype(a.dtype)) if t is None else t


def normal(
    key: Key[Array, "*n"], shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> Float[Array, "b ..."]:
    """Standard normal noise of a batch: from one key, or from keys [n], each of b/n consecutive rows.

    With keys of its own the noise of a row does not depend on what else is in the batch.
    """
    if not _many(key):
        return jax.random.normal(key, shape, dtype)
    own = (shape[0] // key.shape[0], *shape[1:])
    return jax.vmap(lambda one: jax.random.normal(one, own, dtype))(key).reshape(shape)


def split(key: Key[Array, "*n"], number: int) -> Key[Array, "number *n"]:
    """`jax.random.split`; of keys [n] each by itself."""
    if not _many(key):
        return jax.random.split(key, number)
    return jax.vmap(lambda one: jax.random.split(one, number), out_axes=1)(key)


def _many(key: Key[Array, "*n"]) -> bool:
    """Whether these are keys of rows; one key of `jax.random.PRNGKey` is an array [2] as well."""
    return key.ndim > 0 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def start(
    key: Key[Array, "*n"], shape: tuple[int, ...], dtype: DTypeLike, noise: Float[Array, "b ..."] | None
) -> Float[Array, "b ..."]:
    """Where sampling starts: standard normal noise (`normal`), unless it is given."""
    return normal(key, shape, dtype) if noise is None else noise


def elementwise(
    loss: Literal["mse", "l1"], prediction: Float[Array, "*s"], target: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """Squared or absolute error of every element, in float32 or wider."""
    error = prediction.astype(time_dtype(prediction.dtype)) - target
    return jnp.square(error) if loss == "mse" else jnp.abs(error)


def solve(
    field: Field,
    x: Float[Array, "b ..."],
    solver: SolverConfig,
    *,
    intermediates: bool = False,
    stages: PyTree = None,
) -> Samples:
    """Carry `x` along ``dx/dt = field(x, t)`` from t = 0 to t = 1, with fixed or adaptive steps.

    `stages`, for fixed steps only: see `integrate`.
    """
    times = time_grid(solver.grid, solver.num_steps)
    if solver.method in ADAPTIVE:
        return Samples(
            *integrate_adaptive(
                field,
                x,
                times if intermediates else times[[0, -1]],
                method=solver.method,
                rtol=solver.rtol,
                atol=solver.atol,
                intermediates=intermediates,
            )
        )
    how: dict[str, Any] = dict(
        method=solver.method, unroll=min(solver.unroll, solver.num_steps), stages=stages
    )
    end = integrate(field, x, times, intermediates=intermediates, **how)
    assert solver.nfe is not None  # only adaptive methods do not know it
    return Samples(end.x, solver.nfe, end.trajectory)
