"""Diffusion on any affine path: DDPM and score matching in training; ancestral, DDIM, ODE and SDE in sampling.

With a `step_schedules` schedule this is DDPM (Ho et al. 2006.11239) on its T steps; with a continuous one, the
score SDE of Song et al. (2011.13456). The field predicts eps, x1, v, or sigma times the score; denoising score
matching with its usual weight sigma^2, ``sigma^2 |s + eps / sigma|^2 = |sigma s + eps|^2``, is the squared error
of the last, written so that it is finite at t = 1.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from vla_jax.flow.base import Corrupted, Samples, elementwise, noise_and_time, normal, split, start
from vla_jax.flow.config import FIXED, SolverConfig, check_diffusion
from vla_jax.flow.paths import AffinePath, align, time_dtype
from vla_jax.flow.predictions import data_and_noise, from_data_and_noise
from vla_jax.flow.schedules import Schedule
from vla_jax.flow.solvers import Field, integrate, time_grid
from vla_jax.flow.step_schedules import CosineSteps, StepSchedule
from vla_jax.flow.times import TimeSampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diffusion:
    """DDPM, or its continuous limit, on a schedule."""

    schedule: Schedule = dataclasses.field(default_factory=CosineSteps)
    prediction: Literal["eps", "x1", "v", "score"] = "eps"
    times: TimeSampler = dataclasses.field(default_factory=TimeSampler)
    clip: float | None = None
    criterion: Literal["mse", "l1"] = "mse"

    def __post_init__(self):
        if self.prediction in ("eps", "score") and self.schedule.pure_noise:
            raise ValueError(
                f"prediction {self.prediction} says nothing of the data at t = 0 on {self.schedule};"
                " use prediction v, or VP or CosineSteps"
            )

    def corrupt(
        self,
        key: Key[Array, ""],
        a: Float[Array, "b ..."],
        *,
        t: Float[Array, "b *k"] | None = None,
        noise: Float[Array, "b ..."] | None = None,
    ) -> Corrupted:
        """``x_t = alpha a + sigma eps`` at a step of the table, or at any t of a continuous schedule."""
        noise, t = noise_and_time(key, a, self._draw_times, noise, t)
        x_t = AffinePath(self.schedule).interpolate(noise, a, t)
        if self.prediction == "score":
            target = -noise
        else:
            target = from_data_and_noise(self.schedule, self.prediction, a, noise, t)
        return Corrupted(x_t, t, target.astype(a.dtype), noise)

    def loss(self, prediction: Float[Array, "b ..."], target: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Elementwise error, unweighted over time (Ho et al., eq. 14)."""
        return elementwise(self.criterion, prediction, target)

    def _draw_times(self, key, n, dtype):
        """The law's times, on a table those of its steps."""
        t = self.times(key, n, dtype)
        return self.schedule.snap(t) if isinstance(self.schedule, StepSchedule) else t

    def data_and_noise(
        self, field: Field, x: Float[Array, "b ..."], t: Float[Array, "b *k"]
    ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """The field's (x1, eps) at (x, t). A clipped x1 takes its eps along, so that the pair still makes x."""
        value = field(x, t)
        if self.prediction == "score":
            x1, eps = data_and_noise(self.schedule, "eps", -value, x, t)
        else:
            x1, eps = data_and_noise(self.schedule, self.prediction, value, x, t)
        if self.clip is None:
            return x1, eps
        x1 = jnp.clip(x1, -self.clip, self.clip)
        u = align(t, x)
        sigma = self.schedule.sigma(u)
        remade = (x - self.schedule.alpha(u) * x1) / jnp.where(sigma > 0, sigma, 1)
        return x1, jnp.where(sigma > 0, remade, eps)

    def sample(
        self,
        field: Field,
        key: Key[Array, "*n"],
        shape: tuple[int, ...],
        solver: SolverConfig,
        *,
        noise: Float[Array, "b ..."] | None = None,
        dtype: DTypeLike = jnp.float32,
        intermediates: bool = False,
    ) -> Samples:
        """From noise to data.

        ddim, ancestral: steps between times of the table. sde: Euler-Maruyama on the reverse SDE. euler,
        midpoint, heun, rk4: the probability-flow ODE. A table's grid needs num_steps <= T.
        """
        check_diffusion(self.prediction, not self.schedule.pure_noise, solver)
        first, rest = split(key, 2)
        x = start(first, shape, dtype, noise)
        if solver.method in FIXED:
            return self._ode(field, x, solver, intermediates)
        times = self.grid(solver)
        step = self._sde_step if solver.method == "sde" else self._ddim_step
        eta = 1.0 if solver.method == "ancestral" else solver.eta

        def body(x, inputs):
            t, s, key = inputs
            t, s = (jnp.full(x.shape[:1], u) for u in (t, s))
            x = step(field, x, t, s, key, eta).astype(x.dtype)
            return x, (x if intermediates else None)

        times = jnp.asarray(times, time_dtype(x.dtype))
        keys = split(rest, solver.num_steps)
        end, path = jax.lax.scan(body, x, (times[:-1], times[1:], keys), unroll=solver.unroll)
        assert solver.nfe is not None  # only adaptive methods do not know it
        return Samples(end, solver.nfe, None if path is None else jnp.concatenate([x[None], path]))

    def grid(self, solver: SolverConfig) -> Float[np.ndarray, " n"]:
        """The solver's times; on a table rounded to its steps, from the noisiest to one beyond the cleanest."""
        times = time_grid(solver.grid, solver.num_steps)
        if isinstance(self.schedule, StepSchedule):
            times = np.round(times * self.schedule.steps) / self.schedule.steps
            if np.any(np.diff(times) == 0):
                raise ValueError(
                    f"solver.num_steps {solver.num_steps} ({solver.grid}) takes a step of the table of"
                    f" {self.schedule.steps} twice; use fewer steps, or grid=uniform"
                )
        return times

    def _ddim_step(self, field, x, t, s, key, eta):
        """Song et al. 2010.02502, eq. 12 and 16, for any schedule; eta = 1 has DDPM's posterior variance."""
        x1, eps = self.data_and_noise(field, x, t)
        t, s = align(t, x), align(s, x)
        a_t, a_s, v_t, v_s = *map(self.schedule.alpha, (t, s)), *(self.schedule.sigma(u) ** 2 for u in (t, s))
        fresh = eta**2 * (v_t - (a_t / a_s) ** 2 * v_s) * v_s / v_t
        x = a_s * x1 + jnp.sqrt(v_s - fresh) * eps
        return x + jnp.sqrt(fresh) * normal(key, x.shape, x.dtype) if eta else x

    def _sde_step(self, field, x, t, s, key, eta):
        """``dx = (alpha'/alpha x + g^2 score) dt + g dW``, ``g^2 = 2 sigma (sigma alpha'/alpha - sigma')``."""
        _, eps = self.data_and_noise(field, x, t)
        t, s = align(t, x), align(s, x)
        rate = self.schedule.d_alpha(t) / self.schedule.alpha(t)
        sigma = self.schedule.sigma(t)
        g2 = 2 * (sigma**2 * rate - self.schedule.sigma_d_sigma(t))
        noise = normal(key, x.shape, x.dtype)
        return x + (rate * x - g2 * eps / sigma) * (s - t) + jnp.sqrt(g2 * (s - t)) * noise

    def _ode(self, field, x, solver, intermediates):
        """The probability-flow ODE, in the angle phi of the noise.

        In ``y = x / r, r = sqrt(alpha^2 + sigma^2), phi = atan2(sigma, alpha)`` every affine path is a quarter
        circle, ``dy/dphi = -x1 sin(phi) + eps cos(phi)``: no derivative of the schedule, finite at both ends.
        Steps equal in t are long in phi near data where sigma falls steeply: on LinearVP this holds rk4 to order
        2.9 and midpoint to 1.9 (measured; 4 and 2 on VP and Cosine).
        """
        schedule, dtype = self.schedule, time_dtype(x.dtype)
        times = jnp.asarray(self.grid(solver), dtype)
        angles = jnp.arctan2(schedule.sigma(times), schedule.alpha(times))

        def time_of(phi):
            return schedule.inverse_log_snr(jnp.log(jnp.maximum(jnp.cos(phi), 0)) - jnp.log(jnp.sin(phi)))

        def radius(t):
            return jnp.hypot(schedule.alpha(t), schedule.sigma(t))

        def turning(y, phi):
            t = time_of(phi)
            x1, eps = self.data_and_noise(field, y * align(radius(t), y), t)
            phi = align(phi, y)
            return eps * jnp.cos(phi) - x1 * jnp.sin(phi)

        y = (x / radius(times[0])).astype(x.dtype)
        end = integrate(
            turning, y, angles, method=solver.method, unroll=solver.unroll, intermediates=intermediates
        )
        path = end.trajectory
        if path is not None:
            path = (path * align(radius(times), path)).astype(x.dtype)
        return Samples(end.x, solver.nfe, path)
