"""DDPM and its relatives against posteriors, closed-form flows and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow.conftest import normal, normals
from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.flow.diffusion import Diffusion
from vla_jax.flow.metrics import energy_distance
from vla_jax.flow.oracle import GaussianMixture
from vla_jax.flow.processes import make_process
from vla_jax.flow.schedules import VP, Cosine, LinearVP
from vla_jax.flow.step_schedules import CosineSteps, LinearSteps

KINDS = ["eps", "x1", "v", "score"]


def perfect(g, process):
    """The field that a perfectly trained network would be."""

    def field(x, t):
        u, s = t[:, None], process.schedule
        if process.prediction == "x1":
            return g.x1(x, t)
        if process.prediction == "v":
            return s.alpha(u) * g.eps(x, t) - s.sigma(u) * g.x1(x, t)
        return g.eps(x, t) * (1 if process.prediction == "eps" else -1)

    return field


def test_forward_moments_and_steps():
    """q(x_t | a) = N(alpha a, sigma^2), at the steps of the table and nowhere else."""
    process = make_process(
        ProcessConfig(kind="ddpm", path="ddpm_linear", diffusion_steps=50, time="uniform", t_max=1.0)
    )
    a = jnp.full((100_000, 1), 2.0)
    c = jax.device_get(jax.jit(process.corrupt)(jax.random.key(0), a))
    step = np.asarray(c.t * 50)
    np.testing.assert_allclose(step, np.round(step), atol=1e-9)
    assert set(np.unique(np.round(step))) == set(range(50))
    alpha_bar = np.cumprod(1 - np.linspace(0.1, 20, 50) / 50)[::-1]
    for j in (0, 20, 49):
        x = c.x_t[np.round(step) == j]
        np.testing.assert_allclose(x.mean(), np.sqrt(alpha_bar[j]) * 2, atol=0.1)
        np.testing.assert_allclose(x.var(), 1 - alpha_bar[j], rtol=0.15)
    np.testing.assert_array_equal(c.target, c.noise)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_recover_data_and_noise(kind):
    """A perfect answer to one example gives its data and noise back, for any table and continuous path."""
    for schedule in (VP(), CosineSteps(50)):
        process = Diffusion(schedule=schedule, prediction=kind)
        a = normal(0, (5, 3))
        corrupt = jax.jit(process.corrupt)
        c = corrupt(jax.random.key(1), a)
        x1, eps = jax.jit(lambda c, p=process: p.data_and_noise(lambda x, t: c.target, c.x_t, c.t))(c)
        np.testing.assert_allclose(x1, a, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(eps, c.noise, rtol=1e-7, atol=1e-7)
        ends = jax.device_get(corrupt(jax.random.key(1), a, t=jnp.array([0.0, 0.0, 1.0, 1.0, 1.0])))
        assert np.isfinite(ends.target).all() and np.isfinite(ends.x_t).all()


def test_ancestral_step_is_the_posterior():
    """DDIM with eta = 1 draws from q(x_{i-1} | x_i, x0) of Ho et al., eq. 6-7."""
    schedule = CosineSteps(20)
    process = Diffusion(schedule=schedule, prediction="x1")
    betas = schedule.betas()
    alpha_bar = np.cumprod(1 - betas)
    x, x0 = normals(0, 2, (4, 3))
    key = jax.random.key(5)
    step = jax.jit(lambda x, t, s: process._ddim_step(lambda x, t: x0, x, t, s, key, 1.0))
    z = np.asarray(jax.random.normal(key, x.shape))
    for i in (19, 7, 1):
        t, s = (jnp.full(4, 1 - (j + 1) / 20) for j in (i, i - 1))
        made = step(x, t, s)
        mean = (
            np.sqrt(alpha_bar[i - 1]) * betas[i] * x0 + np.sqrt(1 - betas[i]) * (1 - alpha_bar[i - 1]) * x
        ) / (1 - alpha_bar[i])
        variance = (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * betas[i]
        np.testing.assert_allclose(made, mean + np.sqrt(variance) * z, rtol=1e-8)


def carried(process, field, x, solver):
    """Where a deterministic solver takes the noise x."""
    return jax.jit(lambda x: process.sample(field, jax.random.key(0), x.shape, solver, noise=x).x)(x)


def test_deterministic_samplers_reach_the_closed_form():
    """DDIM and the probability-flow ODE on Gaussian data: x -> m + s (x - alpha m) / std of x, at t = 0."""
    g = GaussianMixture(weights=jnp.ones(1), means=jnp.array([[0.7, -1.0]]), stds=jnp.array([[0.5, 1.3]]))
    x = normal(0, (5, 2))
    for schedule in (VP(), LinearVP()):
        exact = GaussianMixture(weights=g.weights, means=g.means, stds=g.stds, schedule=schedule)
        a, s = schedule.alpha(jnp.asarray(0.0)), schedule.sigma(jnp.asarray(0.0))
        truth = g.means + g.stds * (x - a * g.means) / jnp.sqrt(a**2 * g.stds**2 + s**2)
        process = Diffusion(schedule=schedule, prediction="v")

        field = perfect(exact, process)
        for method, tolerance in (("ddim", 0.06), ("midpoint", 3e-3), ("rk4", 1e-5)):
            made = carried(process, field, x, SolverConfig(method=method, num_steps=100))
            np.testing.assert_allclose(made, truth, atol=tolerance, err_msg=f"{schedule} {method}")


def test_ddim_against_a_loop_and_between_predictions(mixture):
    """Song et al., eq. 12, written out in numpy for eps; x1, v and score predictions give the same samples."""
    schedule = LinearSteps(100)
    g = mixture(schedule)
    noise = normal(0, (6, 2))
    solver = SolverConfig(method="ddim", num_steps=10)

    @jax.jit
    def run(kind_noise):
        processes = {kind: Diffusion(schedule=schedule, prediction=kind) for kind in KINDS}
        return {
            kind: p.sample(perfect(g, p), jax.random.key(0), (6, 2), solver, noise=kind_noise).x
            for kind, p in processes.items()
        }

    alpha_bar = np.append(np.cumprod(1 - schedule.betas())[::-1], 1.0)
    x = np.asarray(noise)
    for j in range(0, 100, 10):
        now, then = alpha_bar[j], alpha_bar[j + 10]
        eps = np.asarray(g.eps(jnp.asarray(x), jnp.full(6, j / 100)))
        x = np.sqrt(then) * (x - np.sqrt(1 - now) * eps) / np.sqrt(now) + np.sqrt(1 - then) * eps
    for kind, made in run(noise).items():
        np.testing.assert_allclose(made, x, rtol=1e-6, atol=1e-8, err_msg=kind)


def test_all_samplers_draw_the_same_law(mixture):
    """Ancestral, DDIM, probability-flow ODE and reverse SDE on one field end in one law, the data's."""
    schedule = VP()
    g = mixture(schedule)
    process = Diffusion(schedule=schedule)

    @jax.jit
    def run(key, noise):
        samples = {
            m: process.sample(
                perfect(g, process), key, (2000, 2), SolverConfig(method=m, num_steps=n), noise=noise
            ).x
            for m, n in (("ancestral", 100), ("ddim", 50), ("midpoint", 25), ("sde", 300))
        }
        data = g.sample(jax.random.key(7), 4000)
        return samples, {m: energy_distance(x, data) for m, x in samples.items()}

    noise = normal(0, (2000, 2))
    (first, distance), (second, _) = jax.device_get(
        (run(jax.random.key(1), noise), run(jax.random.key(2), noise))
    )
    for method, x in first.items():
        assert distance[method] < 0.01, method
        fresh = method in (
            "ancestral",
            "sde",
        )  # same start, other key: other samples only where noise is fresh
        assert bool((x != second[method]).any()) == fresh, method


def test_clip_bounds_the_data(optimised):
    process = Diffusion(schedule=CosineSteps(20), clip=1.0)
    solver = SolverConfig(method="ddim", num_steps=5)
    samples = jax.jit(lambda key: process.sample(lambda x, t: 0.1 * x, key, (64, 3), solver))(
        jax.random.key(0)
    )
    assert jnp.abs(samples.x).max() <= 1 and samples.nfe == 5
    x, t = normal(1, (4, 3)), jnp.array([0.0, 0.5, 0.9, 1.0])
    x1, eps = jax.jit(lambda x, t: process.data_and_noise(lambda x, t: 0.1 * x, x, t))(x, t)
    pair = process.schedule.alpha(t)[:, None] * x1 + process.schedule.sigma(t)[:, None] * eps
    np.testing.assert_allclose(pair[:3], x[:3], rtol=1e-9)
    assert jnp.isfinite(eps).all()


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="takes a step of the table of 20 twice"):
        Diffusion(schedule=CosineSteps(20)).grid(SolverConfig(method="ddim", num_steps=21))
    with pytest.raises(ValueError, match="says nothing of the data at t = 0"):
        Diffusion(schedule=Cosine(), prediction="eps")
