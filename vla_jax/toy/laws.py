"""Data in the plane whose density, and whose perfect denoiser on any path, are known.

| law          | is                                                          | entropy [nats] |
|--------------|-------------------------------------------------------------|----------------|
| ring         | radius 1 + 0.1 n at a uniform angle                         | 0.949          |
| checkerboard | uniform on 8 squares of side 2 in [-4, 4]^2: density 1 / 32 | log 32 = 3.466 |
| moons        | two interleaved half circles of radius 2, std 0.2           | 2.395          |
| gmm          | eight Gaussians of std 0.5 around a circle of radius 3      | 3.474          |

Each has ``sample``, ``log_prob`` and ``x1``, the mean of the data given ``x = alpha x1 + sigma eps``, which a perfect
network would know; `field` turns that into a velocity, noise or score. `x1` is closed form for the Gaussians and
moons and a quadrature for the other two, right to 1e-6 for sigma / alpha >= 0.02.
"""

import abc
import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from vla_jax.flow.oracle import GaussianMixture
from vla_jax.flow.paths import align
from vla_jax.flow.predictions import Kind, from_data_and_noise
from vla_jax.flow.schedules import Schedule
from vla_jax.flow.solvers import Field


class Points(NamedTuple):
    """Data points and the class of each (0 where a law has one class)."""

    x: Float[Array, "n 2"]
    label: Int[Array, " n"]


@dataclasses.dataclass(frozen=True)
class Law(abc.ABC):
    """A distribution in the plane."""

    name: ClassVar[str]
    classes: ClassVar[int] = 1
    spread: ClassVar[float]
    """Standard deviation of the data, per axis."""
    extent: ClassVar[float]
    """Half the side of the square to draw."""

    @abc.abstractmethod
    def sample(self, key: Key[Array, ""], n: int) -> Points:
        """`n` fresh data points."""

    @abc.abstractmethod
    def log_prob(self, x: Float[Array, "n 2"]) -> Float[Array, " n"]:
        """Exact log-density, -inf outside the support."""

    @abc.abstractmethod
    def x1(self, x: Float[Array, "n 2"], t: Float[Array, " n"], schedule: Schedule) -> Float[Array, "n 2"]:
        """E[data | x_t = x]."""


@dataclasses.dataclass(frozen=True)
class Ring(Law):
    """Radius 1 + 0.1 n, n standard normal, at a uniform angle."""

    name = "ring"
    spread, extent = 0.711, 1.8
    width: float = 0.1

    def sample(self, key: Key[Array, ""], n: int) -> Points:
        """In polar coordinates."""
        for_angle, for_radius = jax.random.split(key)
        angle = 2 * jnp.pi * jax.random.uniform(for_angle, (n, 1))
        radius = 1 + self.width * jax.random.normal(for_radius, (n, 1))
        x = radius * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)
        return Points(x, jnp.zeros(n, jnp.int32))

    def log_prob(self, x: Float[Array, "n 2"]) -> Float[Array, " n"]:
        """``p(r) / (2 pi r)``; a negative radius stands for the opposite angle."""
        r = jnp.linalg.norm(x, axis=1)
        both = jnp.logaddexp(*(-jnp.square((s * r - 1) / self.width) / 2 for s in (1, -1)))
        return both - jnp.log(self.width * (2 * jnp.pi) ** 1.5 * r)

    def x1(self, x: Float[Array, "n 2"], t: Float[Array, " n"], schedule: Schedule) -> Float[Array, "n 2"]:
        """Sum over 1024 angles; given the angle u, radius and noise are Gaussian: ``x.u = alpha r + sigma n``."""
        angle = jnp.linspace(0, 2 * jnp.pi, 1024, endpoint=False, dtype=x.dtype)
        along = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
        alpha, variance = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None] ** 2
        total = alpha**2 * self.width**2 + variance
        miss = x @ along.T - alpha
        across = x @ jnp.stack([-along[:, 1], along[:, 0]])
        weight = jax.nn.softmax(-(miss**2) / total / 2 - across**2 / variance / 2, axis=1)
        return (weight * (1 + alpha * self.width**2 / total * miss)) @ along


@dataclasses.dataclass(frozen=True)
class Checkerboard(Law):
    """The black squares of a 4 x 4 board of side 8, the lower left one included."""

    name = "checkerboard"
    spread, extent = 2.309, 5.0
    nodes: int = 200
    """Gauss-Legendre nodes a side of a square."""

    def sample(self, key: Key[Array, ""], n: int) -> Points:
        """A column, one of its two squares, a place in it."""
        for_square, for_place = jax.random.split(key)
        square = jax.random.randint(for_square, (n,), 0, 8)
        column = square % 4
        row = 2 * (square // 4) + column % 2
        corner = 2.0 * jnp.stack([column, row], axis=1) - 4
        return Points(corner + 2 * jax.random.uniform(for_place, (n, 2)), jnp.zeros(n, jnp.int32))

    def log_prob(self, x: Float[Array, "n 2"]) -> Float[Array, " n"]:
        """-log 32 on black."""
        cell = jnp.floor((x + 4) / 2)
        black = (jnp.abs(x) <= 4).all(1) & (cell.sum(1) % 2 == 0)
        return jnp.where(black, -jnp.log(32.0), -jnp.inf).astype(x.dtype)

    def x1(self, x: Float[Array, "n 2"], t: Float[Array, " n"], schedule: Schedule) -> Float[Array, "n 2"]:
        """Axis by axis within a square (the integrals separate), then the mean over the black squares."""
        node, weight = np.polynomial.legendre.leggauss(self.nodes)
        place = jnp.asarray(2.0 * np.arange(4)[:, None] - 3 + node, x.dtype)  # square node
        u = t[:, None, None, None]
        gap = x[:, :, None, None] - schedule.alpha(u) * place  # n axis square node
        log_mass = jnp.log(jnp.asarray(weight, x.dtype)) - jnp.square(gap / schedule.sigma(u)) / 2
        mean = jnp.einsum("nasp,sp->nas", jax.nn.softmax(log_mass, axis=-1), place)
        mass = jax.nn.logsumexp(log_mass, axis=-1)
        black = (jnp.arange(4)[:, None] + jnp.arange(4)) % 2 == 0
        joint = jnp.where(black, mass[:, 0, :, None] + mass[:, 1, None, :], -jnp.inf)
        joint = jax.nn.softmax(joint.reshape(-1, 16)).reshape(-1, 4, 4)
        return jnp.stack(
            [jnp.einsum("nij,ni->n", joint, mean[:, 0]), jnp.einsum("nij,nj->n", joint, mean[:, 1])], axis=1
        )


@dataclasses.dataclass(frozen=True)
class Mixture(Law):
    """Equal weights, centres in the order of their classes, one standard deviation."""

    std: float

    @property
    @abc.abstractmethod
    def centres(self) -> Float[np.ndarray, "m 2"]:
        """Where the Gaussians are; as many in each class."""

    def oracle(self, schedule: Schedule) -> GaussianMixture:
        """The same law with everything that `flow.oracle` knows of it."""
        centres = jnp.asarray(self.centres, jnp.float32)
        m = len(centres)
        return GaussianMixture(
            weights=jnp.full(m, 1 / m), means=centres, stds=jnp.full((m, 2), self.std), schedule=schedule
        )

    def sample(self, key: Key[Array, ""], n: int) -> Points:
        """A centre and a Gaussian around it."""
        which, noise = jax.random.split(key)
        m = len(self.centres)
        k = jax.random.randint(which, (n,), 0, m)
        x = jnp.asarray(self.centres, jnp.float32)[k] + self.std * jax.random.normal(noise, (n, 2))
        return Points(x, k // (m // self.classes))

    def log_prob(self, x: Float[Array, "n 2"]) -> Float[Array, " n"]:
        """Log of the mean of the Gaussians."""
        squared = self._squared_distances(x, jnp.ones(x.shape[0]))
        norm = jnp.log(2 * jnp.pi * self.std**2 * len(self.centres))
        return jax.nn.logsumexp(-squared / self.std**2 / 2, axis=1) - norm

    def x1(self, x: Float[Array, "n 2"], t: Float[Array, " n"], schedule: Schedule) -> Float[Array, "n 2"]:
        """Mean over the Gaussians of each one's Wiener estimate."""
        alpha, variance = schedule.alpha(t), schedule.sigma(t) ** 2
        total = (alpha**2 * self.std**2 + variance)[:, None]
        weight = jax.nn.softmax(-self._squared_distances(x, alpha) / total / 2, axis=1)
        centre = weight @ jnp.asarray(self.centres, x.dtype)
        gain = alpha[:, None] * self.std**2 / total
        return centre + gain * (x - alpha[:, None] * centre)

    def _squared_distances(self, x: Float[Array, "n 2"], alpha: Float[Array, " n"]) -> Float[Array, "n m"]:
        """``|x - alpha c|^2`` for every centre c."""
        c = jnp.asarray(self.centres, x.dtype)
        return jnp.square(x[:, None] - alpha[:, None, None] * c).sum(-1)


@dataclasses.dataclass(frozen=True)
class Moons(Mixture):
    """Two half circles of 128 Gaussians each, 0.05 apart: no structure of their own at this std."""

    name = "moons"
    classes = 2
    spread, extent = 1.42, 3.8
    std: float = 0.2

    @functools.cached_property
    def centres(self) -> Float[np.ndarray, "m 2"]:
        """Upper moon, lower moon."""
        angle = np.pi * (np.arange(128) + 0.5) / 128
        upper = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1)
        return 2 * np.concatenate([upper, -upper])


@dataclasses.dataclass(frozen=True)
class Gaussians(Mixture):
    """Eight around a circle: eight classes that overlap a little."""

    name = "gmm"
    classes = 8
    spread, extent = 2.18, 5.0
    std: float = 0.5

    @functools.cached_property
    def centres(self) -> Float[np.ndarray, "m 2"]:
        """From the right, anticlockwise."""
        angle = 2 * np.pi * np.arange(8) / 8
        return 3 * np.stack([np.cos(angle), np.sin(angle)], axis=1)


LAWS: dict[str, Law] = {law.name: law for law in (Ring(), Checkerboard(), Moons(), Gaussians())}


def field(law: Law, schedule: Schedule, kind: Kind) -> Field:
    """What a perfect network would answer, for 0 < t < 1."""

    def exact(x: Float[Array, "n 2"], t: Float[Array, " n"]) -> Float[Array, "n 2"]:
        x1, u = law.x1(x, t, schedule), align(t, x)
        eps = (x - schedule.alpha(u) * x1) / schedule.sigma(u)
        return from_data_and_noise(schedule, kind, x1, eps, t)

    return exact
