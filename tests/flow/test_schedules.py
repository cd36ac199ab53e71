"""Schedules against automatic differentiation, their inverses, and the tables of DDPM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.flow.conftest import ALL, normals
from vla_jax.flow.paths import AffinePath
from vla_jax.flow.schedules import VP, Cosine, Polynomial
from vla_jax.flow.step_schedules import CosineSteps, LinearSteps

INSIDE = (np.arange(997) + 0.37) / 997  # meets no step of the tables


def test_derivatives_are_those_of_the_values(schedule):
    @jax.jit
    def run(t):
        one = jnp.ones_like(t)
        return (
            (schedule.d_alpha(t), jax.jvp(schedule.alpha, (t,), (one,))[1]),
            (schedule.d_sigma(t), jax.jvp(schedule.sigma, (t,), (one,))[1]),
            (schedule.sigma_d_sigma(t), schedule.sigma(t) * schedule.d_sigma(t)),
        )

    for made, expected in run(INSIDE):
        np.testing.assert_allclose(made, expected, rtol=1e-9, atol=1e-12)


def test_path_velocity_is_the_derivative_of_the_path(schedule):
    x0, x1 = normals(0, 2, (5, 3, 2))
    t = np.linspace(0.05, 0.94, 5) + 1e-3
    path = AffinePath(schedule)

    @jax.jit
    def run(x0, x1, t):
        return path.sample(x0, x1, t), jax.jvp(
            lambda s: path.interpolate(x0, x1, s), (t,), (jnp.ones_like(t),)
        )

    point, (x_t, dx_t) = run(x0, x1, t)
    np.testing.assert_allclose(point.x_t, x_t, rtol=1e-12)
    np.testing.assert_allclose(point.dx_t, dx_t, rtol=1e-9)


def test_ends(schedule, optimised):
    ends = jnp.array([0.0, 1.0])
    alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
    assert alpha[1] == 1 and sigma[1] == 0
    assert (alpha[0] == 0) == schedule.pure_noise and alpha[0] < 0.11 and sigma[0] > 0.99
    for f in (schedule.d_alpha, schedule.sigma_d_sigma):
        assert jnp.isfinite(f(ends)).all()
    assert bool(jnp.isinf(schedule.d_sigma(ends))[1]) == schedule.infinite_end
    assert not jnp.isnan(schedule.log_snr(ends)).any()
    np.testing.assert_allclose(schedule.inverse_log_snr(schedule.log_snr(ends)), ends, atol=1e-12)
    infinite = jnp.array([-jnp.inf, jnp.inf])
    np.testing.assert_allclose(schedule.inverse_log_snr(infinite), ends, atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_inverse_in_both_precisions(schedule, dtype):
    t = INSIDE.astype(dtype)
    tolerance = 2e-4 if dtype == jnp.float32 else 1e-9
    back = jax.jit(lambda t: schedule.inverse_log_snr(schedule.log_snr(t)))(t)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, t, atol=tolerance)


@functools.partial(jax.jit, static_argnums=0)
def log_snr(schedule, t):
    return schedule.log_snr(t)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(ALL), st.floats(0, 1), st.floats(0, 1))
def test_snr_increases(schedule, s, t):
    low, high = (float(log_snr(schedule, jnp.asarray(x))) for x in sorted((s, t)))
    assert low <= high + 1e-12


@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("kind", [LinearSteps, CosineSteps])
def test_step_schedule_is_its_table(kind, steps):
    schedule = kind(steps)
    alpha_bar = np.cumprod(1 - schedule.betas())
    t = 1 - (np.arange(steps) + 1) / steps
    run = jax.jit(lambda t: (schedule.alpha(t), schedule.variance(t), schedule.snap(t + 0.4 / steps)))
    alpha, variance, snapped = run(t)
    np.testing.assert_allclose(np.square(alpha), alpha_bar, rtol=1e-9)
    np.testing.assert_allclose(variance, 1 - alpha_bar, rtol=1e-9)
    np.testing.assert_allclose(snapped, t, atol=1e-12)


def test_terminal_noise_of_the_tables():
    """A table for 1000 steps cut to 100 leaves 36 % of the variance; rescaled it leaves 2e-5, cosine 2e-7."""
    naive = np.prod(1 - np.linspace(1e-4, 0.02, 100))
    np.testing.assert_allclose(naive, 0.364, atol=1e-3)
    assert LinearSteps(100).alpha(jnp.asarray(0.0)) ** 2 < 2.1e-5
    np.testing.assert_allclose(CosineSteps(100).alpha(jnp.asarray(0.0)) ** 2, 2.43e-7, rtol=5e-3)


def test_tables_are_the_continuous_schedules():
    """sqrt(alpha_bar) of the cosine table is sin(pi t / 2) within 0.0045; the linear table is VP(0.1, 20)."""
    t = jnp.linspace(0, 1, 1001)
    assert jnp.abs(CosineSteps(1000).alpha(t) - Cosine().alpha(t)).max() < 0.0045
    assert jnp.abs(LinearSteps(1000).alpha(t) - VP().alpha(t)).max() < 1e-3


@pytest.mark.parametrize(
    "make", [lambda: Polynomial(1.0), lambda: VP(1.0, 0.5), lambda: LinearSteps(20), lambda: CosineSteps(1)]
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(ValueError, match=r"use|need"):
        make()
