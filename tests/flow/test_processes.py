"""Processes as a user of the library meets them: corrupt, loss, sample, and the configs that make them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests.flow.conftest import normal, normals
from vla_jax.flow.config import ProcessConfig, SolverConfig, check
from vla_jax.flow.metrics import energy_distance, straightness
from vla_jax.flow.processes import Flow, Regression, make_process
from vla_jax.flow.schedules import CondOT
from vla_jax.flow.solvers import time_grid
from vla_jax.flow.times import Beta, LogitNormal, TimeSampler, Uniform


def test_corrupt_on_the_straight_path():
    """x_t = (1-t) eps + t a, target a - eps; a time per sample or per token."""
    a, noise = normals(0, 2, (3, 4, 2))
    for t in (jnp.array([0.0, 0.3, 1.0]), jnp.linspace(0, 1, 12).reshape(3, 4)):
        c = Flow().corrupt(jax.random.key(1), a, t=t, noise=noise)
        u = np.asarray(t).reshape(*t.shape, *(1,) * (3 - t.ndim))
        np.testing.assert_allclose(c.x_t, (1 - u) * noise + u * a, rtol=1e-12)
        np.testing.assert_array_equal(c.target, a - noise)
        assert c.t is t and c.noise is noise


def test_losses():
    p, y = jnp.array([[1.0, -2.0]]), jnp.array([[0.5, 1.0]])
    np.testing.assert_allclose(Flow().loss(p, y), [[0.25, 9.0]])
    np.testing.assert_allclose(Flow(criterion="l1").loss(p, y), [[0.5, 3.0]])
    half = Flow().loss(p.astype(jnp.bfloat16), y.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_regression_is_one_evaluation_at_zeros():
    a = normal(0, (2, 4, 3))
    process = make_process(ProcessConfig(kind="regression", loss="l1"))
    c = process.corrupt(jax.random.key(1), a)
    assert not c.x_t.any() and not c.t.any() and c.t.shape == (2,)
    np.testing.assert_array_equal(c.target, a)
    samples = process.sample(
        lambda x, t: x + 7 + t[:, None, None], jax.random.key(0), a.shape, SolverConfig()
    )
    assert samples.nfe == 1 and (samples.x == 7).all()
    assert isinstance(process, Regression) and process.loss(a, -a).shape == a.shape


@pytest.mark.parametrize("path", ["cond_ot", "polynomial", "vp", "linear_vp", "cosine"])
def test_every_path_by_name(path):
    """Corrupt, loss and sample in float32 and bfloat16, jitted and vmapped: right shapes and dtypes, finite."""
    process = make_process(ProcessConfig(path=path, stratified=True))
    a = jnp.ones((4, 3, 2), jnp.bfloat16)

    @jax.jit
    def run(key):
        c = process.corrupt(key, a)
        field = lambda x, t: (-x * t[:, None, None]).astype(jnp.float32)  # noqa: E731
        return c, process.sample(field, key, a.shape, SolverConfig(num_steps=2), dtype=jnp.bfloat16).x

    c, x = jax.vmap(run)(jax.random.split(jax.random.key(0), 2))
    assert c.x_t.dtype == c.target.dtype == x.dtype == jnp.bfloat16 and c.t.dtype == jnp.float32
    assert c.x_t.shape == (2, 4, 3, 2) and c.t.shape == (2, 4)
    assert all(jnp.isfinite(y.astype(jnp.float32)).all() for y in (c.x_t, c.target, x))
    assert (c.x_t[0] != c.x_t[1]).any()


def test_sampling_the_mixture(mixture):
    """The exact field carries noise to data; the same noise gives the same data, bit for bit."""
    g = mixture(CondOT())
    solver = SolverConfig(num_steps=50, method="midpoint")

    @jax.jit
    def sample(key):
        return Flow().sample(g.velocity, key, (2000, 2), solver, dtype=jnp.float64, intermediates=True)

    samples = sample(jax.random.key(0))
    np.testing.assert_array_equal(samples.x, sample(jax.random.key(0)).x)
    assert samples.nfe == 100 and samples.trajectory.shape == (51, 2000, 2)
    data = g.sample(jax.random.key(1), 4000)
    assert energy_distance(samples.x, data) < 0.01 < 0.05 < energy_distance(samples.trajectory[0], data)
    again = Flow().sample(g.velocity, jax.random.key(9), (2000, 2), solver, noise=samples.trajectory[0])
    np.testing.assert_allclose(again.x, samples.x, rtol=1e-12)


def test_conditional_and_marginal_losses_have_one_gradient(mixture):
    """The CFM theorem: grad E|u - (a - eps)|^2 = grad E|u - v|^2 for a field linear in features of (x, t)."""
    g = mixture(CondOT())

    @jax.jit
    def gradients(w):
        c = Flow().corrupt(jax.random.key(1), g.sample(jax.random.key(0), 200_000))
        t = c.t[:, None]
        features = jnp.concatenate([c.x_t, c.x_t * t, jnp.tanh(c.x_t), t, jnp.ones_like(t)], 1)

        def gradient(target):
            return jax.grad(lambda w: Flow().loss(features @ w, target).mean())(w).ravel()

        return gradient(c.target), gradient(g.velocity(c.x_t, c.t))

    conditional, marginal = jax.device_get(gradients(normal(2, (8, 2))))
    norms = np.linalg.norm(conditional), np.linalg.norm(marginal)
    assert conditional @ marginal / norms[0] / norms[1] > 0.999
    np.testing.assert_allclose(norms[0] / norms[1], 1, atol=0.01)


def test_time_laws():
    """pi0: its own s = 0.999 B + 0.001 with B ~ Beta(1.5, 1) is our 1 - s; quantiles against scipy."""
    u = np.linspace(0.01, 0.99, 33)
    pi0 = 1 - (0.999 * scipy.stats.beta(1.5, 1).ppf(1 - u) + 0.001)
    np.testing.assert_allclose(0.999 * Beta(a=1.5).quantile(jnp.asarray(u)), pi0, rtol=1e-9)
    t = np.asarray(LogitNormal(mean=0.4, std=1.2).quantile(jnp.asarray(u)))
    np.testing.assert_allclose(scipy.stats.norm(0.4, 1.2).cdf(np.log(t / (1 - t))), u, rtol=1e-9)
    times = make_process(ProcessConfig()).times
    draws = np.asarray(jax.jit(lambda key: times(key, 100_000))(jax.random.key(0)))
    assert draws.dtype == jnp.float32 and draws.min() >= 0 and draws.max() <= 0.999
    np.testing.assert_allclose(draws.mean(), 0.999 * 0.4, atol=3e-3)
    assert scipy.stats.kstest(np.asarray(draws) / 0.999, lambda t: 1 - (1 - t) ** 1.5).pvalue > 1e-3
    ends = jnp.array([0.0, 1.0])
    for law in (Uniform(), Beta(a=1.5), LogitNormal()):
        np.testing.assert_allclose(law.quantile(ends), ends)


def test_stratified_times_fill_every_slice():
    sampler = TimeSampler(t_min=0.2, t_max=0.7, stratified=True)
    t = sampler(jax.random.key(0), 64)
    assert (np.sort(np.floor((np.asarray(t) - 0.2) / 0.5 * 64)) == np.arange(64)).all()
    assert (np.diff(t) < 0).any()
    assert np.var([TimeSampler(stratified=True)(jax.random.key(i), 64).mean() for i in range(20)]) < 1e-5


def test_sinkhorn_coupling_makes_shorter_paths(mixture):

    @jax.jit
    def run(key):
        a = mixture(CondOT()).sample(key, 128)
        return [Flow(coupling=c).corrupt(key, a) for c in ("independent", "sinkhorn")]

    free, paired = jax.device_get(run(jax.random.key(0)))
    np.testing.assert_array_equal(np.sort(free.noise, 0), np.sort(paired.noise, 0))
    assert np.square(paired.target).sum() < 0.5 * np.square(free.target).sum()


def test_straightness():
    """0 on a line; on a half circle of radius 1 at constant speed, int |x' - (x(1) - x(0))|^2 = pi^2 - 4."""
    t = jnp.linspace(0, 1, 2001)
    line = t[:, None, None] * jnp.ones((1, 3, 2))
    np.testing.assert_allclose(straightness(line, t), 0, atol=1e-12)
    circle = jnp.stack([jnp.cos(jnp.pi * t), jnp.sin(jnp.pi * t)], -1)[:, None]
    np.testing.assert_allclose(straightness(circle, t), jnp.pi**2 - 4, rtol=1e-4)


def test_energy_distance():
    """Two points against two points by hand; 0 in the mean for samples of one law."""
    x, y = jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [5.0]])
    distance = jax.jit(energy_distance)
    np.testing.assert_allclose(distance(x, y), 2 * (1 + 5 + 1 + 3) / 4 - 2 - 4)
    z = normals(0, 2, (1000, 2))
    assert abs(distance(*z)) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "vp", "t_max": 1.0}, "infinite velocity at t = 1; use t_max=0.999"),
        ({"path": "ddpm_cosine"}, "kind=ddpm"),
        ({"kind": "ddpm"}, "path=ddpm_cosine"),
        ({"kind": "ddpm", "path": "cosine", "prediction": "score"}, "prediction=v"),
        ({"kind": "regression", "coupling": "sinkhorn"}, "coupling=independent"),
        ({"t_min": 0.5, "t_max": 0.5}, "t_min < t_max"),
        ({"power": 1.0}, "path=cond_ot"),
        ({"beta": 0.0}, "positive"),
        ({"clip": -1.0}, "positive"),
    ],
)
def test_impossible_processes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ProcessConfig(**options)


def test_solvers_that_do_not_fit_are_refused():
    ddpm = ProcessConfig(kind="ddpm", path="cosine", prediction="x1")
    cases = [(ProcessConfig(), "ddim"), (ddpm, "dopri5"), (ddpm, "heun"), (ddpm, "sde")]
    for process, method in cases:
        solver = SolverConfig(method=method)
        with pytest.raises(ValueError, match=f"solver.method {method}"):
            check(process, solver)
        with pytest.raises(ValueError, match=f"solver.method {method}"):
            make_process(process).sample(lambda x, t: x, jax.random.key(0), (2, 2), solver)
    check(ProcessConfig(kind="regression"), SolverConfig(method="ddim"))


def test_edm_grid_is_denser_near_data():
    steps = np.diff(time_grid("edm", 10))
    assert steps[-1] < steps[3] and np.isclose(steps.sum(), 1)
