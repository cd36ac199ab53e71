"""DDPM's schedules of T discrete steps, as schedules in t: step i = T-1 ... 0 stands at ``t = 1 - (i + 1) / T``.

Between two steps log(alpha^2) is a straight line (a constant noise rate), so that value, derivative and inverse
are exact and agree with the tables on the grid; t = 1 is clean data, one step beyond the table's last.

A table made for T = 1000 must not be cut or stretched: with T = 100 steps of beta in (1e-4, 0.02), 36 % of the
data's variance is left where the sampler believes it starts from noise. `LinearSteps` rescales beta by 1000 / T.
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vla_jax.flow.schedules import Time, VariancePreserving


@dataclasses.dataclass(frozen=True)
class StepSchedule(VariancePreserving):
    """``alpha_bar_i = prod_{j <= i} (1 - beta_j)``, ``alpha = sqrt(alpha_bar)`` (Ho et al. 2006.11239, eq. 4)."""

    steps: int = 1000
    pure_noise = False

    def __post_init__(self):
        if self.steps < 2:
            raise ValueError(f"{type(self).__name__} steps {self.steps}; use at least 2")

    @abc.abstractmethod
    def betas(self) -> Float[np.ndarray, " steps"]:
        """Noise rate of each step, from the cleanest to the noisiest."""

    def log_alpha_bar(self) -> Float[np.ndarray, " knots"]:
        """log(alpha^2) at t = 0, 1/T, ..., 1."""
        return _log_alpha_bar(self)

    def snap(self, t: Time) -> Time:
        """The step at or below t, as a time: where a network trained on steps has been."""
        return jnp.minimum(jnp.floor(t * self.steps), self.steps - 1) / self.steps

    def _line(self, t: Time) -> tuple[Array, Array]:
        """log(alpha^2) at t and its slope."""
        knots = jnp.asarray(self.log_alpha_bar(), t.dtype)
        left = jnp.clip(jnp.floor(t * self.steps), 0, self.steps - 1).astype(jnp.int32)
        rise = knots[left + 1] - knots[left]
        # From the right knot and in units of steps: exactly 0 at t = 1, where sigma is a square root of this.
        return knots[left + 1] - rise * ((left + 1).astype(t.dtype) - t * self.steps), rise * self.steps

    def alpha(self, t: Time) -> Time:
        """sqrt(alpha_bar)."""
        return jnp.exp(self._line(t)[0] / 2)

    def variance(self, t: Time) -> Time:
        """1 - alpha_bar."""
        return -jnp.expm1(self._line(t)[0])

    def d_alpha(self, t: Time) -> Time:
        """Alpha times half the slope; at a step, the slope towards data."""
        value, slope = self._line(t)
        return jnp.exp(value / 2) * slope / 2

    def inverse_log_snr(self, log_snr: Time) -> Time:
        """``log(alpha^2) = -log(1 + snr^-2)``, then along the line."""
        knots = jnp.asarray(self.log_alpha_bar(), log_snr.dtype)
        return jnp.interp(
            -jax.nn.softplus(-2 * log_snr), knots, jnp.linspace(0, 1, self.steps + 1, dtype=knots.dtype)
        )


@functools.lru_cache(maxsize=32)
def _log_alpha_bar(schedule: StepSchedule) -> Float[np.ndarray, " knots"]:
    return np.concatenate([[0.0], np.cumsum(np.log1p(-schedule.betas()))])[::-1].copy()


@dataclasses.dataclass(frozen=True)
class LinearSteps(StepSchedule):
    """beta from 1e-4 to 0.02 over 1000 steps (Ho et al. 2020), rescaled by 1000 / T: VP(0.1, 20) in disguise."""

    def __post_init__(self):
        if self.steps < 21:
            raise ValueError(f"LinearSteps steps {self.steps} makes a beta of 1 or more; use at least 21")

    def betas(self) -> Float[np.ndarray, " steps"]:
        """``linspace(0.1, 20, T) / T``."""
        return np.linspace(0.1, 20.0, self.steps) / self.steps


@dataclasses.dataclass(frozen=True)
class CosineSteps(StepSchedule):
    """``alpha_bar(u) ~ cos^2(pi/2 (u + s) / (1 + s))``, s = 0.008, beta <= 0.999 (2102.09672, eq. 17)."""

    def betas(self) -> Float[np.ndarray, " steps"]:
        """``1 - alpha_bar(u + 1/T) / alpha_bar(u)``, clipped so that the noisiest step keeps a trace of data."""
        u = np.linspace(0.0, 1.0, self.steps + 1)
        alpha_bar = np.cos(np.pi / 2 * (u + 0.008) / 1.008) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
