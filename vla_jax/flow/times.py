"""The law of t in training. Each law is its quantile function, so that any of them can be stratified.

t = 0 is noise. pi0 draws *its* time ``s = 0.999 B + 0.001, B ~ Beta(1.5, 1)``, with s = 1 noise; ours is
``t = 1 - s = 0.999 (1 - B)``: `Beta(1.5)` on [0, 0.999], mean 0.4, so noisy times are seen more often.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from vla_jax.flow.paths import time_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every time equally often."""

    def quantile(self, u: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """The quantile function of the uniform law on [0, 1] is the identity."""
        return u


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beta:
    """``1 - B, B ~ Beta(a, 1)``, whose distribution function is ``B^a`` (Black et al. 2024, appendix B)."""

    a: float = 1.5

    def quantile(self, u: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """``1 - (1 - u)^(1/a)``."""
        return 1 - (1 - u) ** (1 / self.a)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """``logit(t) ~ N(mean, std^2)`` (Esser et al. 2024, eq. 19); mean > 0 is closer to data."""

    mean: float = 0.0
    std: float = 1.0

    def quantile(self, u: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """sigmoid(mean + std ndtri(u)); 0 and 1 at the ends."""
        logit = self.mean + self.std * ndtri(u.astype(time_dtype(u.dtype)))
        return jax.nn.sigmoid(logit).astype(u.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeSampler:
    """Draws of a law squeezed into [t_min, t_max]."""

    law: Uniform | Beta | LogitNormal = Uniform()
    t_min: float = 0.0
    t_max: float = 1.0
    stratified: bool = False

    def __call__(self, key: Key[Array, ""], n: int, dtype: DTypeLike = jnp.float32) -> Float[Array, " n"]:
        """`n` times. Stratified: one from each of n equal slices, in random order (less gradient noise)."""
        draw, order = jax.random.split(key)
        u = jax.random.uniform(draw, (n,), dtype)
        if self.stratified:
            u = (jax.random.permutation(order, n) + u) / n
        return self.t_min + (self.t_max - self.t_min) * self.law.quantile(u)
