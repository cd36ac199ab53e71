"""The exact mixture against automatic differentiation of its own log density, and the continuity equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow.conftest import normal
from vla_jax.flow.oracle import GaussianMixture
from vla_jax.flow.predictions import convert
from vla_jax.flow.schedules import Cosine


@pytest.fixture
def points():
    x = normal(1, (9, 2)) * 1.5
    return x, jnp.array([0.0, 0.013, 0.1, 0.33, 0.5, 0.71, 0.903, 0.999, 1.0])


def test_score_and_continuity(schedule, mixture, points):
    """score = grad log p; d_t log p + div v + v . score = 0, the continuity equation over p."""
    g, (x, t) = mixture(schedule), points
    t = jnp.clip(t, 0.002, 0.998)  # d_t sigma itself is infinite at the end of some schedules

    @jax.jit
    def residuals(x, t):
        def log_p(x, t):
            return g.log_prob(x[None], t[None])[0]

        score, rate = jax.vmap(jax.grad(log_p, (0, 1)))(x, t)
        jacobian = jax.vmap(jax.jacfwd(lambda x, t: g.velocity(x[None], t[None])[0]))(x, t)
        divergence = jnp.trace(jacobian, axis1=1, axis2=2)
        continuity = rate + g.divergence(x, t) + jnp.sum(g.velocity(x, t) * g.score(x, t), -1)
        return score - g.score(x, t), divergence - g.divergence(x, t), continuity

    score, divergence, continuity = residuals(x, t)
    np.testing.assert_allclose(score, 0, atol=1e-10)
    np.testing.assert_allclose(divergence, 0, atol=1e-8)
    np.testing.assert_allclose(continuity, 0, atol=1e-7)


def test_finite_at_both_ends(schedule, mixture):
    g = mixture(schedule)
    x = jnp.array([[0.3, -2.0], [40.0, 1.0]])

    @jax.jit
    def values(t):
        return [f(x, t) for f in (g.score, g.eps, g.x1, g.velocity, g.divergence, g.log_prob)]

    for t in (jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]), jnp.asarray(0.0), jnp.asarray(1.0)):
        assert all(jnp.isfinite(value).all() for value in values(t))
    np.testing.assert_allclose(values(jnp.ones(2))[2], x, rtol=1e-12)


def test_expectations_are_averages_of_data(mixture):
    """x1 and velocity are means over data points, weighted by how well they explain x (self-normalised)."""
    g = mixture(Cosine())
    data = np.asarray(jax.jit(lambda key: g.sample(key, 400_000))(jax.random.key(0)))
    x, t = jnp.array([[0.4, 0.1]]), jnp.array([0.6])
    x1, velocity = jax.jit(lambda x, t: (g.x1(x, t)[0], g.velocity(x, t)[0]))(x, t)
    angle = np.pi / 2 * 0.6
    eps = (np.asarray(x) - np.sin(angle) * data) / np.cos(angle)
    w = np.exp(-np.sum(eps**2, -1) / 2)[:, None]
    w /= w.sum()
    np.testing.assert_allclose(x1, (w * data).sum(0), atol=0.01)
    each = np.pi / 2 * (np.cos(angle) * data - np.sin(angle) * eps)
    np.testing.assert_allclose(velocity, (w * each).sum(0), atol=0.02)


def test_score_knows_nothing_of_the_normaliser():
    """Zero at the mode, zero half way between two equal bumps."""
    two = GaussianMixture(
        weights=jnp.array([0.5, 0.5]), means=jnp.array([[-1.0], [1.0]]), stds=jnp.full((2, 1), 0.3)
    )
    assert two.score(jnp.zeros((1, 1)), jnp.asarray(0.9)) == 0
    one = GaussianMixture(weights=jnp.array([7.0]), means=jnp.array([[2.0]]), stds=jnp.ones((1, 1)))
    assert one.score(jnp.full((1, 1), 2.0), jnp.asarray(1.0)) == 0
    half = GaussianMixture(weights=jnp.array([3.5]), means=one.means, stds=one.stds)
    x = jnp.array([[0.3]])
    assert half.score(x, jnp.asarray(0.5)) == one.score(x, jnp.asarray(0.5))


def test_conversions_agree_with_the_oracle(schedule, mixture, points):
    """On exact fields: from each conditional expectation follow the others."""
    g, (x, t) = mixture(schedule), points
    t = jnp.clip(t, 0.05, 0.95)

    @jax.jit
    def made(x, t):
        truth = {"velocity": g.velocity(x, t), "eps": g.eps(x, t), "x1": g.x1(x, t), "score": g.score(x, t)}
        return truth, {
            source: {target: convert(schedule, source, target, value, x, t) for target in truth}
            for source, value in truth.items()
        }

    truth, all_made = jax.device_get(made(x, t))
    for source, row in all_made.items():
        for target, value in row.items():
            np.testing.assert_allclose(
                value, truth[target], rtol=1e-8, atol=1e-8, err_msg=f"{source} -> {target}"
            )
