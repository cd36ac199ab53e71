"""What the informed network is told beforehand is true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.flow.oracle import GaussianMixture
from vla_jax.flow.predictions import from_data_and_noise
from vla_jax.flow.schedules import VP, CondOT, Cosine
from vla_jax.flow.step_schedules import LinearSteps
from vla_jax.toy.network import Informed, precondition, waves


@pytest.mark.parametrize(
    "schedule", [CondOT(), Cosine(), VP(), LinearSteps(100)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("kind", ["velocity", "eps", "x1", "v", "score"])
def test_precondition_is_the_gaussian_case(schedule, kind):
    """For data N(0, s^2): skip x is the exact answer, and what it leaves has variance scale^2."""
    s, n = 1.7, 50_000
    x1, eps = s * np.random.default_rng(0).normal(size=(n, 2)), np.random.default_rng(1).normal(size=(n, 2))
    x1, eps = jnp.asarray(x1, jnp.float32), jnp.asarray(eps, jnp.float32)
    gaussian = GaussianMixture(
        weights=jnp.ones(1), means=jnp.zeros((1, 2)), stds=jnp.full((1, 2), s), schedule=schedule
    )
    for t in (0.1, 0.5, 0.9):
        t = jnp.float32(t)
        skip, scale = precondition(schedule, kind, s, t)
        x = schedule.alpha(t) * x1 + schedule.sigma(t) * eps
        target = -eps if kind == "score" else from_data_and_noise(schedule, kind, x1, eps, t)
        assert jnp.std(target - skip * x) == pytest.approx(abs(float(scale)), rel=0.02)
        if kind in ("velocity", "eps", "x1"):
            exact = getattr(gaussian, kind)(x[:50], jnp.full(50, t))
            np.testing.assert_allclose(skip * x[:50], exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["velocity", "eps", "x1", "v", "score"])
def test_finite_at_both_ends(kind):
    """No prediction is singular at t = 0 or 1 (velocities on paths whose own velocity is finite)."""
    schedules = (CondOT(), Cosine()) if kind == "velocity" else (CondOT(), Cosine(), VP(), LinearSteps(100))
    x, t, label = jnp.ones((2, 2)), jnp.array([0.0, 1.0]), jnp.zeros(2, jnp.int32)
    for schedule in schedules:
        net = Informed(schedule=schedule, kind=kind, spread=2.0, width=16, depth=1)
        params = jax.jit(net.init)(jax.random.key(0), x, t, label)
        params = jax.tree.map(lambda p: p + 0.1, params)  # also the last layer, which begins at zero
        value, gradient = jax.jit(jax.value_and_grad(lambda p: net.apply(p, x, t, label).sum()))(params)
        assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_waves_are_damped_as_their_mean_is():
    """``E cos(k x1) = cos(k m) exp(-k^2 w^2 / 2)`` for x1 ~ N(m, w^2), the network's features."""
    k = waves(3, 0.7, 6.0)
    assert k.shape == (2, 12) and np.linalg.norm(k, axis=0).max() == pytest.approx(6.0)
    m, w = np.array([0.4, -0.2]), 0.3
    x1 = m + w * np.random.default_rng(0).normal(size=(100_000, 2))
    expected = np.cos(x1 @ k).mean(0)
    np.testing.assert_allclose(np.cos(m @ k) * np.exp(-(w**2) * (k**2).sum(0) / 2), expected, atol=1e-2)
