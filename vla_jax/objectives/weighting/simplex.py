"""Minimising a convex function over the weights w ≥ 0, Σ w = 1, where it is known how to do it for two of them.

Two weights share their sum so that the function is smallest, all others held; then the next two. Along each pair the
minimum is exact, so for two losses one step is the answer; for more the pairs are gone through `SWEEPS` times. (For
smooth convex functions coordinate descent over pairs converges to the minimum, linearly where it is strongly convex.)
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SWEEPS = 50
"""On 2,000 random sets of 3 to 5 gradients the worst value is within 1e-4 of the minimum, relative to the largest
squared norm (tests/objectives/test_weighting_several.py)."""

Ends = Float[Array, "2 n"]
"""The weights if one of the two had the whole of their sum: of the first, of the second."""


def minimise(n: int, share: Callable[[Ends], Float[Array, ""]]) -> Float[Array, " n"]:
    """The weights; `share(ends)` is the u in [0, 1] at which u · ends[0] + (1 - u) · ends[1] has the smallest value."""

    def sweep(_: int | Int[Array, ""], w: Float[Array, " n"]) -> Float[Array, " n"]:
        for i, j in itertools.combinations(range(n), 2):
            both = w[i] + w[j]
            ends = jnp.stack([w.at[i].set(both).at[j].set(0), w.at[i].set(0).at[j].set(both)])
            u = share(ends)
            w = w.at[i].set(u * both).at[j].set((1 - u) * both)
        return w

    start = jnp.full((n,), 1 / n)
    return sweep(0, start) if n < 3 else jax.lax.fori_loop(0, SWEEPS, sweep, start)
