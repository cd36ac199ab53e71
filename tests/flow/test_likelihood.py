"""Likelihoods of chunks against the exact density of a mixture, and of a linear field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow.conftest import normal, normals
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.likelihood import exact_divergence, hutchinson_divergence, log_likelihood
from vla_jax.flow.oracle import GaussianMixture

RK4 = SolverConfig(method="rk4", num_steps=60)


@pytest.fixture
def chunks():
    """A mixture of 3 x 2 action chunks, as a field on [b k a]."""
    means, stds = normals(0, 2, (2, 6))
    g = GaussianMixture(weights=jnp.array([0.4, 0.6]), means=means, stds=0.6 + 0.2 * jnp.abs(stds))
    return g, lambda x, t: g.velocity(x.reshape(-1, 6), t).reshape(x.shape)


def test_exact_likelihood_of_chunks(chunks):
    g, field = chunks
    x = normal(1, (8, 3, 2))

    @jax.jit
    def both(x):
        return log_likelihood(field, x, RK4), g.log_prob(x.reshape(8, 6), jnp.asarray(1.0))

    made, truth = both(x)
    np.testing.assert_allclose(made.log_prob, truth, atol=1e-4)
    assert made.noise.shape == (8, 3, 2)


def test_divergences(chunks):
    """Exact against the oracle; Hutchinson's mean over all sign vectors is the trace."""
    g, field = chunks
    x, t = normal(2, (4, 3, 2)), jnp.linspace(0.1, 0.9, 4)
    signs = 2.0 * ((np.arange(64)[:, None] >> np.arange(6)) & 1) - 1
    probes = np.broadcast_to(signs.reshape(64, 1, 3, 2), (64, 4, 3, 2))

    @jax.jit
    def run(x, t, probes):
        value, divergence = exact_divergence(field, x, t, jnp.ones(x.shape, bool))
        estimate = hutchinson_divergence(field, x, t, probes)[1]
        return value - field(x, t), divergence, estimate, g.divergence(x.reshape(4, 6), t)

    difference, divergence, estimate, truth = run(x, t, probes)
    np.testing.assert_allclose(difference, 0, atol=1e-12)
    np.testing.assert_allclose(divergence, truth, rtol=1e-9)
    np.testing.assert_allclose(estimate, truth, rtol=1e-9)


def test_padding_counts_for_nothing():
    """A masked chunk has the likelihood of its valid part, whatever the padding holds; also by Hutchinson."""
    rates = np.array([[0.5, -1.0], [0.2, 0.7], [3.0, 3.0]])
    mask = np.array([[True, True], [True, False], [False, False]])[None].repeat(2, 0)

    def field(x, t):
        return rates * x

    x = np.asarray(normal(0, (2, 3, 2)))
    noise = x * np.exp(-rates)
    expected = np.where(mask, -(noise**2) / 2 - np.log(2 * np.pi) / 2 - rates, 0).sum((1, 2))
    solve = jax.jit(lambda x, mask, key: log_likelihood(field, x, RK4, mask=mask, key=key, probes=2))
    for filled in (x, np.where(mask, x, 1e3)):
        for key in (None, jax.random.key(3)):
            made = jax.device_get(solve(filled, mask, key))
            np.testing.assert_allclose(made.log_prob, expected, rtol=1e-6)
            np.testing.assert_allclose(made.noise[~mask], filled[~mask])


def test_gradient():
    """d log p / d theta for dx/dt = theta x: log p = log N(x e^-theta) - theta per entry."""

    def log_prob(theta):
        return log_likelihood(lambda x, t: theta * x, x, RK4).log_prob.sum()

    x = jnp.array([[1.0, 2.0], [0.5, -1.0]])
    gradient = jax.jit(jax.grad(log_prob))(0.3)
    np.testing.assert_allclose(gradient, (x**2 * np.exp(-0.6) - 1).sum(), rtol=1e-6)


def test_only_fixed_steps():
    with pytest.raises(ValueError, match=r"solver.method ddim can't solve a likelihood"):
        log_likelihood(lambda x, t: x, jnp.ones((1, 1)), SolverConfig(method="ddim"))
