"""MeanFlow: one evaluation from noise to data (Geng et al. 2505.13447), with t = 0 noise.

The field predicts the mean velocity over an interval, ``u(x_t, t, s) = 1/(s-t) int_t^s v dtau``, so that
``x_s = x_t + (s - t) u``. Differentiating ``(s - t) u`` along a trajectory gives what training asks for,

    u = v + (s - t) du/dt,    du/dt = v . grad_x u + d_t u    (one forward derivative of the field),

the paper's eq. 6 with time reversed. s = t is flow matching.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from vla_jax.flow.base import Samples, start
from vla_jax.flow.paths import align, time_dtype
from vla_jax.flow.times import LogitNormal, TimeSampler

IntervalField = Callable[[Array, Array, Array], Array]


class Interval(NamedTuple):
    """A training example: a point of a straight path, the velocity there, and where its interval ends."""

    x_t: Float[Array, "b ..."]
    t: Float[Array, " b"]
    s: Float[Array, " b"]
    velocity: Float[Array, "b ..."]


def mean_velocity_target(field: IntervalField, x: Interval) -> Float[Array, "b ..."]:
    """``v + (s - t) du/dt``, held constant for the gradient; exactly u where the field is already right."""
    tangents = (x.velocity, jnp.ones_like(x.t), jnp.zeros_like(x.s))
    _, rate = jax.jvp(field, (x.x_t, x.t, x.s), tangents)
    return jax.lax.stop_gradient(x.velocity + align(x.s - x.t, x.x_t) * rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlow:
    """Training and sampling of ``field(x, t, s)``."""

    times: TimeSampler = dataclasses.field(default_factory=lambda: TimeSampler(law=LogitNormal(mean=0.4)))
    instantaneous: float = 0.75
    """Share of examples with s = t."""

    def corrupt(self, key: Key[Array, ""], a: Float[Array, "b ..."]) -> Interval:
        """Two times in order, of which `instantaneous` are equal, and a point on a straight path."""
        for_noise, for_t, for_s, for_equal = jax.random.split(key, 4)
        dtype, b = time_dtype(a.dtype), a.shape[0]
        t, s = self.times(for_t, b, dtype), self.times(for_s, b, dtype)
        t, s = jnp.minimum(t, s), jnp.maximum(t, s)
        s = jnp.where(jax.random.bernoulli(for_equal, self.instantaneous, (b,)), t, s)
        noise = jax.random.normal(for_noise, a.shape, a.dtype)
        u = align(t, a)
        return Interval(((1 - u) * noise + u * a).astype(a.dtype), t, s, a - noise)

    def loss(self, field: IntervalField, example: Interval) -> Float[Array, " b"]:
        """Mean squared error of each sample, divided by itself (+ 0.01) held constant (the paper's p = 1)."""
        error = jnp.square(field(example.x_t, example.t, example.s) - mean_velocity_target(field, example))
        error = error.reshape(error.shape[0], -1).mean(1)
        return error / jax.lax.stop_gradient(error + 0.01)

    def sample(
        self,
        field: IntervalField,
        key: Key[Array, ""],
        shape: tuple[int, ...],
        *,
        num_steps: int = 1,
        noise: Float[Array, "b ..."] | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> Samples:
        """``x_s = x_t + (s - t) u(x_t, t, s)`` over `num_steps` equal intervals."""
        x = start(key, shape, dtype, noise)
        times = jnp.linspace(0, 1, num_steps + 1, dtype=time_dtype(x.dtype))

        def step(x, ends):
            t, s = (jnp.full(x.shape[:1], end) for end in ends)
            return (x + align(s - t, x) * field(x, t, s)).astype(x.dtype), None

        x, _ = jax.lax.scan(step, x, (times[:-1], times[1:]))
        return Samples(x, num_steps)
