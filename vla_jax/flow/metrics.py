"""How good samples are, and how straight the way to them."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def straightness(trajectory: Float[Array, "n b ..."], times: Float[Array, " n"]) -> Float[Array, " b"]:
    """``int |x'(t) - (x(1) - x(0))|^2 dt`` of each sample: 0 for a straight line at constant speed (2209.03003)."""
    h = jnp.diff(times).reshape(-1, *(1,) * (trajectory.ndim - 1))
    bend = jnp.diff(trajectory, axis=0) / h - (trajectory[-1] - trajectory[0])
    return jnp.sum(h * jnp.square(bend), axis=(0, *range(2, trajectory.ndim)))


def energy_distance(x: Float[Array, "n a"], y: Float[Array, "m a"]) -> Float[Array, ""]:
    """``2 E|x - y| - E|x - x'| - E|y - y'|``, without bias: 0 in the mean for samples of one law (Szekely 2013)."""

    def mean_distance(a, b, pairs):
        squared = jnp.sum(a**2, 1)[:, None] + jnp.sum(b**2, 1)[None] - 2 * a @ b.T
        apart = squared > 0  # the square root has no gradient at 0, where a point meets itself
        return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0).sum() / pairs

    n, m = x.shape[0], y.shape[0]
    return (
        2 * mean_distance(x, y, n * m) - mean_distance(x, x, n * (n - 1)) - mean_distance(y, y, m * (m - 1))
    )
