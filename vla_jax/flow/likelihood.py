"""Likelihood of data under a velocity field: the instantaneous change of variables (Chen et al. 1806.07366).

``log p_1(x_1) = log N(x_0) - int_0^1 div field(x_t, t) dt`` along the trajectory that ends at x_1, solved backwards
with the fixed-step methods. Works on any shape, e.g. action chunks [b k a], with a mask for padding; jit- and
grad-clean, so that it can be trained on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from vla_jax.flow.config import FIXED, SolverConfig
from vla_jax.flow.solvers import Field, integrate, time_grid


class Likelihood(NamedTuple):
    """log p_1 of each sample, in nats, and the noise that it came from."""

    log_prob: Float[Array, " b"]
    noise: Float[Array, "b ..."]


def exact_divergence(
    field: Field, x: Float[Array, "b ..."], t: Float[Array, " b"], mask: Bool[Array, "b ..."]
) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
    """(field, its divergence over the entries under `mask`): one forward derivative per entry of a sample."""
    value, push = jax.linearize(lambda x: field(x, t), x)

    def diagonal(i):
        basis = jnp.zeros_like(x).reshape(x.shape[0], -1).at[:, i].set(1)
        return push(basis.reshape(x.shape)).reshape(x.shape[0], -1)[:, i]

    entries = jax.vmap(diagonal, out_axes=1)(jnp.arange(x[0].size))
    return value, jnp.sum(jnp.where(mask.reshape(entries.shape), entries, 0), axis=1)


def hutchinson_divergence(
    field: Field,
    x: Float[Array, "b ..."],
    t: Float[Array, " b"],
    probes: Float[Array, "r b ..."],
) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
    """(field, unbiased estimate of its divergence): mean over r probes z of ``z . J z`` (1810.01367)."""
    value, push = jax.linearize(lambda x: field(x, t), x)
    estimates = jax.vmap(lambda z: jnp.sum((z * push(z)).reshape(x.shape[0], -1), axis=1))(probes)
    return value, estimates.mean(0)


def log_likelihood(
    field: Field,
    x: Float[Array, "b ..."],
    solver: SolverConfig,
    *,
    mask: Bool[Array, "b ..."] | None = None,
    key: Key[Array, ""] | None = None,
    probes: int = 1,
) -> Likelihood:
    """Log-density of data `x` under the flow of `field` from standard normal noise.

    Exact by default; with `key`, Hutchinson's estimate from `probes` Rademacher vectors, kept along the trajectory:
    unbiased, and cheaper by the number of entries over `probes`. Entries outside `mask` keep their value, are seen
    by the field and count for nothing. The field must treat samples independently of each other.
    """
    if solver.method not in FIXED:
        raise ValueError(
            f"solver.method {solver.method} can't solve a likelihood; use one of {', '.join(FIXED)}"
        )
    b, shape = x.shape[0], x.shape
    mask = jnp.ones(shape, bool) if mask is None else mask
    signs = None
    if key is not None:
        signs = jax.random.rademacher(key, (probes, *shape), x.dtype) * mask

    def augmented(state, t):
        x = state[:, :-1].reshape(shape)
        if signs is None:
            value, divergence = exact_divergence(field, x, t, mask)
        else:
            value, divergence = hutchinson_divergence(field, x, t, signs)
        value = jnp.where(mask, value, 0).reshape(b, -1)
        return jnp.concatenate([value, divergence[:, None]], axis=1)

    state = jnp.concatenate([x.reshape(b, -1), jnp.zeros((b, 1), x.dtype)], axis=1)
    times = time_grid(solver.grid, solver.num_steps)[::-1].copy()
    state = integrate(augmented, state, times, method=solver.method, unroll=solver.unroll).x
    noise = state[:, :-1].reshape(shape)
    normal = jnp.where(mask, -jnp.square(noise) / 2 - jnp.log(2 * jnp.pi) / 2, 0).reshape(b, -1).sum(1)
    # Solved from 1 to 0, the last entry is minus the integral from 0 to 1.
    return Likelihood(normal + state[:, -1], noise)
