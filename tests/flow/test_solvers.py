"""Solvers: their order on the exact mixture, their options, adaptive steps, and that they transform cleanly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow.conftest import normal
from vla_jax.flow.base import solve
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.schedules import CondOT
from vla_jax.flow.solvers import integrate, time_grid

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4, "rk38": 4}


@pytest.mark.parametrize("own_times", [False, True], ids=["shared-t", "t-per-sample"])
def test_orders(smooth, mixture, own_times):
    """Error ~ N^-order for every path, the batch with one time or each sample on its way to its own end.

    All resolutions run on grids of one length: who has arrived makes steps of zero.
    """
    g = mixture(smooth)
    x = normal(0, (8, 2))
    ramps = np.stack([np.minimum(np.arange(1281) / n, 1) for n in (320, 640, 1280)])

    @jax.jit
    def ends(x, times):
        return {method: integrate(g.velocity, x, times, method=method).x for method in ORDERS}

    if own_times:
        times = (ramps[:, :, None] * np.linspace(0.5, 1.0, 8)).transpose(1, 0, 2).reshape(1281, 24)
        made = {m: y.reshape(3, 8, 2) for m, y in ends(jnp.tile(x, (3, 1)), times).items()}
    else:
        runs = [ends(x, ramp) for ramp in ramps]
        made = {m: [run[m] for run in runs] for m in ORDERS}
    for method, (a, b, c) in jax.device_get(made).items():
        order = np.log2(np.linalg.norm(a - b) / np.linalg.norm(b - c))
        assert abs(order - ORDERS[method]) < 0.1, (method, order)


def test_against_diffrax_and_each_other(mixture):
    """dopri5 and tsit5 reach what many RK4 steps reach; evaluations are counted as they happen."""
    g = mixture(CondOT())
    x = normal(0, (8, 2))
    calls = []

    def field(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return g.velocity(x, t)

    truth = solve(g.velocity, x, SolverConfig(method="rk4", num_steps=200)).x
    for method in ("dopri5", "tsit5"):
        solver = SolverConfig(method=method, rtol=1e-8, atol=1e-8, num_steps=4)
        result = solve(field, x, solver, intermediates=True)
        jax.effects_barrier()
        np.testing.assert_allclose(result.x, truth, atol=1e-6)
        assert int(result.nfe) == len(calls) > 50
        calls.clear()
        assert result.trajectory.shape == (5, 8, 2)
        np.testing.assert_array_equal(result.trajectory[0], x)
        np.testing.assert_array_equal(result.trajectory[-1], result.x)
        assert solver.nfe is None


@pytest.mark.parametrize("method", ORDERS)
def test_evaluations_are_counted(method):
    calls = []

    def field(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return -x

    solver = SolverConfig(method=method, num_steps=3)
    result = solve(field, jnp.ones((2, 1)), solver)
    jax.effects_barrier()
    assert len(calls) == result.nfe == solver.nfe


def test_against_a_loop_in_numpy():
    """Euler and midpoint, the two that policies use, step by step; unrolling changes nothing."""
    x0 = np.random.default_rng(0).normal(size=(3, 4, 2))

    def slope(x, t):
        return np.sin(3 * t) * x - x**3

    def field(x, t):
        return jnp.sin(3 * t)[:, None, None] * x - x**3

    x, y = x0, x0
    for i in range(7):
        t, h = i / 7, 1 / 7
        x = x + h * slope(x, t)
        y = y + h * slope(y + h / 2 * slope(y, t), t + h / 2)
    for method, expected in (("euler", x), ("midpoint", y)):
        for unroll in (1, 3):
            made = integrate(field, jnp.asarray(x0), time_grid("uniform", 7), method=method, unroll=unroll)
            np.testing.assert_allclose(made.x, expected, rtol=1e-12)


def test_intermediates_backwards_and_dtypes(mixture):
    g = mixture(CondOT())
    x = normal(0, (4, 2))
    there = integrate(g.velocity, x, time_grid("uniform", 80), method="rk4", intermediates=True)
    assert there.trajectory.shape == (81, 4, 2)
    np.testing.assert_array_equal(there.trajectory[0], x)
    np.testing.assert_array_equal(there.trajectory[-1], there.x)
    back = integrate(g.velocity, there.x, time_grid("uniform", 80)[::-1].copy(), method="rk4")
    np.testing.assert_allclose(back.x, x, atol=1e-4)
    half = integrate(
        lambda x, t: (x * t[:, None]).astype(jnp.float32), x.astype(jnp.bfloat16), time_grid("uniform", 4)
    )
    assert half.x.dtype == jnp.bfloat16


def test_jit_vmap_grad():
    """Reverse-mode through the scan against the closed form of dx/dt = theta x: d x(1) / d theta = x0 e^theta."""

    def end(theta, x):
        return integrate(lambda x, t: theta * x, x, time_grid("uniform", 50), method="rk4").x.sum()

    theta = jnp.array([0.5, -1.0])
    x = jnp.ones((2, 1, 1))
    gradient = jax.jit(jax.vmap(jax.grad(end)))(theta, x)
    np.testing.assert_allclose(gradient, jnp.exp(theta), rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 10])
def test_grids(n):
    for name in ("uniform", "edm"):
        grid = time_grid(name, n)
        assert grid.shape == (n + 1,) and grid[0] == 0 and grid[-1] == 1 and (np.diff(grid) > 0).all()
    if n == 10:  # levels 80 ... 0.002 of Karras et al. on CondOT are (1 - t) / t
        np.testing.assert_allclose((1 - time_grid("edm", n)[-2]) / time_grid("edm", n)[-2], 0.002, rtol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 0},
        {"unroll": 0},
        {"eta": 0.5},
        {"eta": -1.0},
        {"rtol": 0.0},
    ],
)
def test_impossible_solvers_are_refused(options):
    with pytest.raises(ValueError, match="solver"):
        SolverConfig(**options)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_adaptive_steps_end_at_the_first_value_that_is_not_finite(method, value):
    """Counted by the field itself, from its first answer and from halfway."""
    for since, most in ((0.0, 8), (0.5, 200)):
        calls = []

        def field(x, t):
            jax.debug.callback(lambda: calls.append(1))
            return jnp.where(t[:, None] >= since, value, 1.0) * x

        with pytest.raises(RuntimeError, match=f"solver.method {method}: .* NaN or infinite"):
            jax.block_until_ready(solve(field, jnp.ones((2, 3)), SolverConfig(method=method)).x)
        jax.effects_barrier()
        assert len(calls) <= most


def test_adaptive_steps_that_do_not_arrive_say_so(monkeypatch):
    monkeypatch.setattr("vla_jax.flow.adaptive.MAX_STEPS", 16)
    with pytest.raises(RuntimeError, match=r"has not arrived after 16 steps; raise solver\.rtol"):
        solve(
            lambda x, t: 1e3 * jnp.cos(1e3 * t)[:, None] + 0 * x,
            jnp.ones((1, 1)),
            SolverConfig(method="dopri5", rtol=1e-6, atol=1e-6),
        ).x.block_until_ready()
