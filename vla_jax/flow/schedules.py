"""Schedules: how much data, alpha(t), and how much noise, sigma(t), are in ``x_t = alpha x1 + sigma eps``.

t = 0 is noise, t = 1 is data; all schedules end at alpha(1) = 1, sigma(1) = 0 exactly. Every formula is the
one that is finite at both ends, where the quantity exists there at all:

| schedule   | alpha          | sigma              | alpha(0) | sigma'(1)       |
|------------|----------------|--------------------|----------|-----------------|
| CondOT     | t              | 1 - t              | 0        | -1              |
| Polynomial | t^n            | 1 - t^n            | 0        | -n              |
| Cosine     | sin(pi t / 2)  | cos(pi t / 2)      | 0        | -pi / 2         |
| LinearVP   | t              | sqrt(1 - t^2)      | 0        | -inf            |
| VP         | exp(-T(t) / 2) | sqrt(1 - exp(-T))  | > 0      | -inf            |

Sources: Lipman et al. 2022 (2210.02747), section 4.1; Lipman et al. 2024 (2412.06264), section 4.8; for VP,
Song et al. 2020 (2011.13456), appendix B, with T = (1-t)^2 (B-b)/2 + (1-t) b.
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Time = Float[Array, "*t"]


@dataclasses.dataclass(frozen=True)
class Schedule(abc.ABC):
    """alpha, sigma, their derivatives, and ``log(alpha / sigma)`` with its inverse."""

    pure_noise: ClassVar[bool] = True
    """alpha(0) = 0: the path starts at noise that holds nothing of the data."""
    infinite_end: ClassVar[bool] = False
    """sigma'(1) = -inf: sigma leaves data like sqrt(1 - t)."""
    lost_start: ClassVar[bool] = False
    """alpha'(0) = sigma'(0) = 0: the velocity at t = 0 is zero and says nothing about the data."""

    @abc.abstractmethod
    def alpha(self, t: Time) -> Time:
        """Weight of the data."""

    @abc.abstractmethod
    def sigma(self, t: Time) -> Time:
        """Weight of the noise."""

    @abc.abstractmethod
    def d_alpha(self, t: Time) -> Time:
        """Time derivative of alpha."""

    @abc.abstractmethod
    def d_sigma(self, t: Time) -> Time:
        """Time derivative of sigma."""

    def sigma_d_sigma(self, t: Time) -> Time:
        """``sigma sigma' = (sigma^2)' / 2``: finite at t = 1 even where sigma' is not."""
        return self.sigma(t) * self.d_sigma(t)

    def log_snr(self, t: Time) -> Time:
        """``log(alpha / sigma)``, increasing; +inf at t = 1, and -inf at t = 0 where alpha(0) = 0."""
        return jnp.log(self.alpha(t)) - jnp.log(self.sigma(t))

    @abc.abstractmethod
    def inverse_log_snr(self, log_snr: Time) -> Time:
        """The t of a log signal-to-noise ratio; outside the schedule's range, its nearer end."""

    @abc.abstractmethod
    def pair_of_velocity(self, velocity: Array, x: Array, t: Array) -> tuple[Array, Array]:
        """(x1, eps) from ``velocity = alpha' x1 + sigma' eps`` and x; t broadcasts against x."""


@dataclasses.dataclass(frozen=True)
class CondOT(Schedule):
    """The straight line of rectified flow and pi0: ``x_t = t x1 + (1 - t) eps``."""

    def alpha(self, t: Time) -> Time:
        """alpha = t."""
        return t

    def sigma(self, t: Time) -> Time:
        """sigma = 1 - t."""
        return 1 - t

    def d_alpha(self, t: Time) -> Time:
        """alpha' = 1 at every t."""
        return jnp.ones_like(t)

    def d_sigma(self, t: Time) -> Time:
        """sigma' = -1 at every t."""
        return -jnp.ones_like(t)

    def inverse_log_snr(self, log_snr: Time) -> Time:
        """``t / (1 - t) = snr``."""
        return jax.nn.sigmoid(log_snr)

    def pair_of_velocity(self, velocity: Array, x: Array, t: Array) -> tuple[Array, Array]:
        """Walk along the line to its two ends."""
        return x + (1 - t) * velocity, x - t * velocity


@dataclasses.dataclass(frozen=True)
class Polynomial(Schedule):
    """``alpha = t^n, sigma = 1 - t^n``: the straight line at another pace; n >= 1."""

    power: float = 2.0
    lost_start = True

    def __post_init__(self):
        if self.power <= 1:
            raise ValueError(f"Polynomial power {self.power}; use more than 1, or CondOT for 1")

    def alpha(self, t: Time) -> Time:
        """t^n."""
        return t**self.power

    def sigma(self, t: Time) -> Time:
        """1 - t^n."""
        return 1 - t**self.power

    def d_alpha(self, t: Time) -> Time:
        """n t^(n-1)."""
        return self.power * t ** (self.power - 1)

    def d_sigma(self, t: Time) -> Time:
        """-n t^(n-1)."""
        return -self.d_alpha(t)

    def inverse_log_snr(self, log_snr: Time) -> Time:
        """CondOT's inverse, at this pace."""
        return jax.nn.sigmoid(log_snr) ** (1 / self.power)

    def pair_of_velocity(self, velocity: Array, x: Array, t: Array) -> tuple[Array, Array]:
        """As CondOT with velocity / alpha'; eps written without that ratio, so only x1 is lost at t = 0."""
        return x + self.sigma(t) / self.d_alpha(t) * velocity, x - t / self.power * velocity


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
    """``alpha = sin(pi t / 2), sigma = cos(pi t / 2)``: a quarter circle at constant speed."""

    def alpha(self, t: Time) -> Time:
        """sin(pi t / 2)."""
        return jnp.sin(jnp.pi / 2 * t)

    def sigma(self, t: Time) -> Time:
        """cos(pi t / 2), written as a sine so that it is exactly 0 at t = 1."""
        return jnp.sin(jnp.pi / 2 * (1 - t))

    def d_alpha(self, t: Time) -> Time:
        """pi/2 sigma."""
        return jnp.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Time) -> Time:
        """-pi/2 alpha."""
        return -jnp.pi / 2 * self.alpha(t)

    def inverse_log_snr(self, log_snr: Time) -> Time:
        """``tan(pi t / 2) = snr``."""
        return 2 / jnp.pi * jnp.arctan(jnp.exp(log_snr))

    def pair_of_velocity(self, velocity: Array, x: Array, t: Array) -> tuple[Array, Array]:
        """Rotate (x, velocity) back by the angle pi t / 2."""
        v = 2 / jnp.pi * velocity
        return self.alpha(t) * x + self.sigma(t) * v, self.sigma(t) * x - self.alpha(t) * v


@dataclasses.dataclass(frozen=True)
class VariancePreserving(Schedule):
    """``alpha^2 + sigma^2 = 1`` with alpha'(1) > 0; subclasses define alpha, alpha' and sigma^2."""

    infinite_end = True

    @abc.abstractmethod
    def variance(self, t: Time) -> Time:
        """sigma^2 = 1 - alpha^2, without cancellation near t = 1."""

    def sigma(self, t: Time) -> Time:
        """sqrt(1 - alpha^2)."""
        return jnp.sqrt(self.variance(t))

    def d_sigma(self, t: Time) -> Time:
        """From ``alpha alpha' + sigma sigma' = 0``; truly -inf at t = 1."""
        return self.sigma_d_sigma(t) / self.sigma(t)

    def sigma_d_sigma(self, t: Time) -> Time:
        """``-alpha alpha'``."""
        return -self.alpha(t) * self.d_alpha(t)

    def pair_of_velocity(self, velocity: Array, x: Array, t: Array) -> tuple[Array, Array]:
        """Without sigma': ``x1 = alpha x + sigma^2 v / alpha'``, ``eps = sigma (x - alpha v / alpha')``."""
        alpha, v = self.alpha(t), velocity / self.d_alpha(t)
        return alpha * x + self.variance(t) * v, self.sigma(t) * (x - alpha * v)


@dataclasses.dataclass(frozen=True)
class LinearVP(VariancePreserving):
    """``alpha = t, sigma = sqrt(1 - t^2)``."""

    def alpha(self, t: Time) -> Time:
        """alpha = t; the noise's variance is 1 - t^2."""
        return t

    def variance(self, t: Time) -> Time:
        """1 - t^2."""
        return (1 - t) * (1 + t)

    def d_alpha(self, t: Time) -> Time:
        """alpha' = 1 at every t."""
        return jnp.ones_like(t)

    def inverse_log_snr(self, log_snr: Time) -> Time:
        """``t^2 = snr^2 / (1 + snr^2)``."""
        return jnp.sqrt(jax.nn.sigmoid(2 * log_snr))


@dataclasses.dataclass(frozen=True)
class VP(VariancePreserving):
    """The variance-preserving SDE of Song et al.; alpha(0) = exp(-(b + B) / 4) = 0.0066: nearly noise."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    pure_noise = False

    def __post_init__(self):
        if not 0 < self.beta_min < self.beta_max:
            raise ValueError(
                f"VP beta_min {self.beta_min}, beta_max {self.beta_max}: need 0 < beta_min < beta_max"
            )

    def integral(self, t: Time) -> Time:
        """``T = int_0^(1-t) beta``, the accumulated noise rate."""
        u = 1 - t
        return u * (self.beta_min + u * (self.beta_max - self.beta_min) / 2)

    def alpha(self, t: Time) -> Time:
        """exp(-T / 2)."""
        return jnp.exp(-self.integral(t) / 2)

    def variance(self, t: Time) -> Time:
        """1 - exp(-T)."""
        return -jnp.expm1(-self.integral(t))

    def d_alpha(self, t: Time) -> Time:
        """``beta(1-t) alpha / 2``."""
        return (self.beta_min + (1 - t) * (self.beta_max - self.beta_min)) * self.alpha(t) / 2

    def inverse_log_snr(self, log_snr: Time) -> Time:
        """``T = log(1 + snr^-2)``, then the root of the quadratic that keeps its digits near t = 1."""
        b, span = self.beta_min, self.beta_max - self.beta_min
        integral = jnp.minimum(jax.nn.softplus(-2 * log_snr), b + span / 2)
        return 1 - 2 * integral / (b + jnp.sqrt(b**2 + 2 * span * integral))
