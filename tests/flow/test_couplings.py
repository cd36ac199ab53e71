"""Couplings against brute force and scipy, and what they do to a conditional model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow.conftest import normals
from vla_jax.flow.couplings import condition_cost, exact_pairs, sinkhorn_pairs, sinkhorn_plan, squared_cost


def total(noise, data, pairs):
    return float(jnp.sum(jnp.square(noise[pairs] - data)))


def test_exact_is_the_best_of_all_permutations():
    """Distances are squared: plain ones are another problem, with other pairs."""
    noise, data = np.random.default_rng(1).normal(size=(2, 6, 3))
    costs = {p: total(noise, data, list(p)) for p in itertools.permutations(range(6))}
    pairs = exact_pairs(noise, data)
    assert tuple(pairs) == min(costs, key=costs.get)
    unsquared = {p: np.linalg.norm(noise[list(p)] - data, axis=1).sum() for p in costs}
    assert min(unsquared, key=unsquared.get) != tuple(pairs)


@pytest.mark.parametrize("dims", [2, 14])
def test_sinkhorn_is_a_permutation_near_the_optimum(dims):
    noise, data = normals(0, 2, (64, dims))
    pairs = jax.jit(sinkhorn_pairs)(noise, data + 1)
    assert (jnp.sort(pairs) == jnp.arange(64)).all()
    best = total(noise, data + 1, exact_pairs(np.asarray(noise), np.asarray(data + 1)))
    assert best <= total(noise, data + 1, pairs) < 1.01 * best < total(noise, data + 1, jnp.arange(64))


def test_plan_has_unit_margins_and_any_scale():
    noise, data = normals(0, 2, (16, 3))
    cost = squared_cost(noise, data)
    plan = sinkhorn_plan(cost, epsilon=0.5)
    for axis in (0, 1):
        np.testing.assert_allclose(jnp.exp(plan).sum(axis), 1, atol=1e-6)
    np.testing.assert_allclose(plan, sinkhorn_plan(1e6 * cost, epsilon=0.5), rtol=1e-6, atol=1e-6)
    assert jnp.isfinite(sinkhorn_plan(jnp.zeros((4, 4)))).all()


def test_condition_keeps_the_prior():
    """Plain pairing gives each condition its own share of the noise; with the condition's cost none does."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 256)
    data = rng.normal(size=(256, 2)) * 0.2 + np.where(label, 2.0, -2.0)[:, None]
    noise = rng.normal(size=(256, 2))

    def skew(pairs):
        return np.linalg.norm(noise[pairs][label == 1].mean(0) - noise[pairs][label == 0].mean(0))

    extra = condition_cost(label, weight=1e3)
    plain, fair = exact_pairs(noise, data), exact_pairs(noise, data, extra)
    assert (label[fair] == label).all()
    assert skew(plain) > 1 and skew(fair) == pytest.approx(skew(np.arange(256))) and skew(fair) < 0.3
    assert total(noise, data, fair) < total(noise, data, np.arange(256))
    on_device = sinkhorn_pairs(jnp.asarray(noise), jnp.asarray(data), jnp.asarray(extra))
    assert (label[on_device] == label).mean() > 0.98
    np.testing.assert_allclose(condition_cost(np.array([[0.0], [2.0]]), 3.0), [[0, 12], [12, 0]])
