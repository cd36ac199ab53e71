"""Our paths, conversions and solvers against Meta's flow_matching 1.0.10 (a dev-only dependency, CC BY-NC).

Where the library has no answer (its conversions give NaN at an end, its exact likelihood fails on chunks) that is
asserted too, so that the day it changes is noticed. torchdiffeq, beneath it, calls Kutta's 3/8 rule "rk4".
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flow_matching.path import AffineProbPath
from flow_matching.path import scheduler as theirs
from flow_matching.path.scheduler.schedule_transform import ScheduleTransformedModel
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper

from vla_jax.flow import schedules as ours
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.likelihood import log_likelihood
from vla_jax.flow.paths import AffinePath
from vla_jax.flow.predictions import convert
from vla_jax.flow.processes import Flow
from vla_jax.flow.transform import change_schedule

PAIRS = [
    (ours.CondOT(), theirs.CondOTScheduler()),
    (ours.Polynomial(3.0), theirs.PolynomialConvexScheduler(3)),
    (ours.Cosine(), theirs.CosineScheduler()),
    (ours.LinearVP(), theirs.LinearVPScheduler()),
    (ours.VP(), theirs.VPScheduler()),
]
METHODS = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "heun3": "heun3", "rk38": "rk4"}
INSIDE = (np.arange(1000) + 0.5) / 1000
K, A, WIDTH = 16, 7, 64


def same(made, expected, rtol=1e-12, atol=1e-12):
    np.testing.assert_allclose(np.asarray(made), np.asarray(expected), rtol=rtol, atol=atol)


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: type(pair[0]).__name__)
def pair(request):
    with jax.enable_x64(True):
        yield request.param


def test_schedules(pair):
    """Values and derivatives at 1000 times, 1e-12 in float64; and the inverse of the SNR."""
    our, their = pair
    t = jnp.asarray(INSIDE)
    expected = their(torch.from_numpy(INSIDE))
    made = jax.jit(lambda t: (our.alpha(t), our.sigma(t), our.d_alpha(t), our.d_sigma(t)))(t)
    for mine, name in zip(made, ("alpha_t", "sigma_t", "d_alpha_t", "d_sigma_t")):
        same(mine, getattr(expected, name))
    snr = np.geomspace(0.02, 50, 100)
    same(our.inverse_log_snr(jnp.log(snr)), their.snr_inverse(torch.from_numpy(snr)), rtol=1e-10)


def test_paths_and_conversions(pair):
    """x_t, dx_t and the six conversions, 1e-12 in float64 relative to the largest number involved."""
    our, their = pair
    rng = np.random.default_rng(0)
    x0, x1, value = rng.normal(size=(3, 20, K, A))
    t = np.linspace(0.03, 0.97, 20)
    path = AffineProbPath(their)
    expected = path.sample(*(torch.from_numpy(x) for x in (x0, x1, t)))
    made = AffinePath(our).sample(*(jnp.asarray(x) for x in (x0, x1, t)))
    for field in ("x_0", "x_1", "t", "x_t", "dx_t"):
        same(getattr(made, field), getattr(expected, field))

    names = {"velocity": "velocity", "x1": "target", "eps": "epsilon"}
    wide = torch.from_numpy(t)[:, None, None].expand(20, K, A)
    x_t = torch.from_numpy(np.array(made.x_t))

    @jax.jit
    def convert_all(value, x, t):
        return {(a, b): convert(our, a, b, value, x, t) for a in names for b in names if a != b}

    for (a, b), result in convert_all(value, made.x_t, t).items():
        converter = getattr(path, f"{names[a]}_to_{names[b]}")
        reference = converter(torch.from_numpy(value), x_t, wide).numpy()
        same(result, reference, atol=1e-12 * np.abs(reference).max())


def test_ends_where_theirs_are_nan():
    """On the straight path x1 gives no velocity at t = 1, eps none at t = 0: theirs NaN or inf, ours refuses.

    And where the answer exists, e.g. x1 from eps' velocity at t = 1, ours is finite.
    """
    path, x = AffineProbPath(theirs.CondOTScheduler()), torch.zeros(2)
    assert not path.target_to_velocity(x, x, torch.ones(2)).isfinite().any()
    assert not path.epsilon_to_velocity(x, x, torch.zeros(2)).isfinite().any()
    zeros = jnp.zeros(2)
    for kind, end in (("x1", 1.0), ("eps", 0.0)):
        with pytest.raises(ValueError, match="does not determine velocity"):
            convert(ours.CondOT(), kind, "velocity", zeros, zeros, jnp.full(2, end))
    assert torch.isinf(theirs.LinearVPScheduler()(torch.ones(1)).d_sigma_t).all()
    assert jnp.isfinite(convert(ours.LinearVP(), "velocity", "eps", zeros, zeros, jnp.ones(2))).all()


def network(params, x, t):
    """Two hidden layers on [chunk, t]; `numpy` parameters serve both libraries."""
    h = jnp.concatenate([x.reshape(x.shape[0], -1), t[:, None]], 1)
    for w, b in params[:-1]:
        h = jax.nn.silu(h @ w + b)
    return (h @ params[-1][0] + params[-1][1]).reshape(x.shape)


class Network(torch.nn.Module):
    """The same, called as their solver calls: (x=, t=scalar)."""

    def __init__(self, params, dtype):
        super().__init__()
        self.layers = [tuple(torch.from_numpy(np.array(p)).to(dtype) for p in layer) for layer in params]
        self.calls = 0

    def forward(self, x, t):
        self.calls += 1
        h = torch.cat([x.flatten(1), torch.as_tensor(t, dtype=x.dtype).expand(x.shape[0], 1)], 1)
        for w, b in self.layers[:-1]:
            h = torch.nn.functional.silu(h @ w + b)
        w, b = self.layers[-1]
        return (h @ w + b).reshape(x.shape)


@pytest.fixture(scope="module")
def trained():
    """Weights of a velocity field trained for 200 steps on smooth chunks, and noise to start from."""
    rng = np.random.default_rng(0)
    sizes = [K * A + 1, WIDTH, WIDTH, K * A]
    params = [
        (rng.normal(size=(n, m)).astype(np.float32) / np.sqrt(n), np.zeros(m, np.float32))
        for n, m in itertools.pairwise(sizes)
    ]
    data = jnp.asarray(np.cumsum(rng.normal(size=(256, K, A)), 1) / 4, jnp.float32)
    process, optimizer = Flow(), optax.adam(3e-3)

    def loss(params, key):
        c = process.corrupt(key, data)
        return process.loss(network(params, c.x_t, c.t), c.target).mean()

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(0), 200)
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, losses

    params, losses = jax.device_get(train(params))
    assert losses[-20:].mean() < 0.8 * losses[:20].mean()
    return params, rng.normal(size=(8, K, A)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_samples_and_evaluations(trained, method):
    """The same samples to 1e-6 in float32, from as many evaluations."""
    params, x = trained
    model = Network(params, torch.float32)
    their = ODESolver(model).sample(torch.from_numpy(x), step_size=1 / 20, method=METHODS[method])
    solver = SolverConfig(method=method, num_steps=20)
    made = jax.jit(
        lambda x: Flow().sample(
            lambda x, t: network(params, x, t), jax.random.key(0), x.shape, solver, noise=jnp.asarray(x)
        )
    )(x)
    assert made.nfe == model.calls
    same(made.x, their, rtol=0, atol=1e-6 * max(1, np.abs(made.x).max()))


def test_classical_rk4(trained):
    """Their "rk4" is the 3/8 rule; ours is the classical one: equal up to the methods' own error, order 4."""
    with jax.enable_x64(True):
        params, x = trained
        x = x.astype(np.float64)
        model, gaps = Network(params, torch.float64), []
        params = jax.tree.map(lambda p: p.astype(np.float64), params)
        for n in (10, 20):
            their = ODESolver(model).sample(
                torch.from_numpy(x),
                step_size=1 / n,
                method="rk4",
                time_grid=torch.tensor([0.0, 1.0]).double(),
            )
            solver = SolverConfig(method="rk4", num_steps=n)
            field = lambda x, t: network(params, x, t)  # noqa: E731
            made = Flow().sample(field, jax.random.key(0), x.shape, solver, noise=jnp.asarray(x))
            gaps.append(np.abs(made.x - their.numpy()).max())
        assert model.calls == 4 * (10 + 20) and made.nfe == 80 and gaps[1] < 1e-6 and gaps[0] / gaps[1] > 10


def test_intermediates_reverse_and_adaptive(trained):
    params, x = trained
    field = lambda x, t: network(params, x, t)  # noqa: E731
    solver = ODESolver(Network(params, torch.float32))
    grid = torch.linspace(0, 1, 5)
    their = solver.sample(
        torch.from_numpy(x), step_size=None, method="midpoint", time_grid=grid, return_intermediates=True
    )
    config = SolverConfig(method="midpoint", num_steps=4)
    made = Flow().sample(field, jax.random.key(0), x.shape, config, noise=jnp.asarray(x), intermediates=True)
    same(made.trajectory, torch.stack(list(their)), rtol=0, atol=2e-6)
    their = solver.sample(torch.from_numpy(x), step_size=None, method="dopri5", atol=1e-6, rtol=1e-6)
    made = Flow().sample(
        field,
        jax.random.key(0),
        x.shape,
        SolverConfig(method="dopri5", rtol=1e-6, atol=1e-6),
        noise=jnp.asarray(x),
    )
    same(made.x, their, rtol=0, atol=1e-5)


def test_likelihood(trained):
    """On flat vectors the exact log-likelihoods agree; on chunks theirs raises and ours does not change."""
    params, x = trained
    flat = x[:2].reshape(2, -1)
    model = Network(params, torch.float32)

    def log_p0(x):
        return -0.5 * (x.flatten(1) ** 2).sum(1) - 0.5 * x[0].numel() * np.log(2 * np.pi)

    def their(x):
        return (
            ODESolver(model)
            .compute_likelihood(
                torch.from_numpy(x), log_p0, step_size=0.25, method="midpoint", exact_divergence=True
            )[1]
            .detach()
        )

    config = SolverConfig(method="midpoint", num_steps=4)
    likelihood = jax.jit(lambda x: log_likelihood(lambda x, t: network(params, x, t), x, config).log_prob)
    expected = their(flat)
    same(likelihood(flat), expected, rtol=2e-5)
    same(likelihood(x[:2]), expected, rtol=2e-5)
    with pytest.raises(IndexError):
        their(x[:2])


def test_schedule_change(trained):
    """A trained field moved to another schedule, as their ScheduleTransformedModel moves it."""
    params, x = trained
    their = ScheduleTransformedModel(
        ModelWrapper(Network(params, torch.float32)), theirs.CondOTScheduler(), theirs.CosineScheduler()
    )
    moved = change_schedule(lambda x, t: network(params, x, t), ours.CondOT(), ours.Cosine())
    for t in (0.2, 0.5, 0.8):
        expected = their(torch.from_numpy(x), torch.tensor(t)).detach()
        same(jax.jit(moved)(x, jnp.full(8, t)), expected, rtol=0, atol=1e-4)


def test_wrapper_of_the_tutorial_does_not_run():
    """Notes write `forward(self, x, t, extras)`; the solver passes keywords, so it must be `**extras`."""

    class Noted(ModelWrapper):
        def forward(self, x, t, extras):
            return self.model(x)

    class Mended(ModelWrapper):
        def forward(self, x, t, **extras):
            return self.model(x)

    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match="extras"):
        ODESolver(Noted(torch.nn.Identity())).sample(x, 0.5, method="euler")
    made = ODESolver(Mended(torch.nn.Identity())).sample(x, 0.5, method="euler")
    same(made, 2.25 * x)  # (1 + 1/2)^2
