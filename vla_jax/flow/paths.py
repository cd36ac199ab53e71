"""Affine probability paths: ``x_t = alpha(t) x_1 + sigma(t) x_0`` and its velocity, for one pair of ends."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from vla_jax.flow.schedules import Schedule


def time_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Times are float32 even beside bfloat16 data: 0.999 and 1 are the same number in bfloat16."""
    return jnp.promote_types(dtype, jnp.float32)


def align(t: Shaped[Array, "*t"], x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """`t` with ones appended, to broadcast against `x` from the left: [b] or [b k] against [b k a]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


class PathSample(NamedTuple):
    """A point of a path and its velocity, with what they were made of."""

    x_1: Float[Array, "..."]
    x_0: Float[Array, "..."]
    t: Float[Array, "*t"]
    x_t: Float[Array, "..."]
    dx_t: Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class AffinePath:
    """The path of a schedule (Lipman et al. 2412.06264, eq. 4.50)."""

    schedule: Schedule

    def interpolate(
        self, x_0: Float[Array, "..."], x_1: Float[Array, "..."], t: Float[Array, "*t"]
    ) -> Float[Array, "..."]:
        """``x_t = alpha x_1 + sigma x_0``; t may be [], [b], [b k]."""
        u = align(t, x_1)
        return (self.schedule.alpha(u) * x_1 + self.schedule.sigma(u) * x_0).astype(x_1.dtype)

    def sample(self, x_0: Float[Array, "..."], x_1: Float[Array, "..."], t: Float[Array, "*t"]) -> PathSample:
        """``x_t`` and ``dx_t = alpha' x_1 + sigma' x_0``; t may be [], [b], [b k]."""
        s, u = self.schedule, align(t, x_1)
        dx_t = s.d_alpha(u) * x_1 + s.d_sigma(u) * x_0
        return PathSample(x_1, x_0, t, self.interpolate(x_0, x_1, t), dx_t.astype(x_1.dtype))
