"""The smallest robot policy, with the shapes of its docstring."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vla_jax.flow.config import ProcessConfig
from vla_jax.toy.robot_flow_policy import RobotFlowPolicy


def test_shapes_loss_and_latency():
    """State 64, action 7, horizon 16, hidden 256, 20 steps -> [1 16 7]; jitted, below 0.1 s of CPU."""
    policy = RobotFlowPolicy()
    params = policy.init(jax.random.key(0))
    state, chunk = jnp.ones((5, 64)), jnp.zeros((5, 16, 7))
    loss = policy.compute_loss(params, jax.random.key(1), state, chunk)
    assert loss.shape == () and 0.3 < loss < 3  # zero chunks: about the variance of the noise
    sample = jax.jit(lambda p, k, s: policy.sample_actions(p, k, s, 20))
    actions = sample(params, jax.random.key(2), state[:1])
    assert actions.shape == (1, 16, 7) and jnp.isfinite(actions).all()
    start = time.process_time()
    for _ in range(5):
        sample(params, jax.random.key(2), state[:1]).block_until_ready()
    assert (time.process_time() - start) / 5 < 0.1


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_learns_two_ways_round(kind):
    """The state says where to go; left or right is free: every sample goes one of both ways, neither the middle."""
    process = (
        ProcessConfig()
        if kind == "flow"
        else ProcessConfig(kind="ddpm", path="ddpm_cosine", time="uniform", t_max=1.0, clip=1.0)
    )
    policy = RobotFlowPolicy(state_dim=1, action_dim=1, horizon=4, hidden=64, process=process)
    optimiser = optax.adam(3e-3)

    def data(key, n):
        for_state, for_side = jax.random.split(key)
        state = jax.random.uniform(for_state, (n, 1), minval=0.3, maxval=0.9)
        side = jnp.where(jax.random.bernoulli(for_side, 0.5, (n, 1)), 1.0, -1.0)
        return state, jnp.broadcast_to((side * state)[:, None], (n, 4, 1))

    def step(carry, key):
        params, optimiser_state = carry
        for_data, for_loss = jax.random.split(key)
        gradient = jax.grad(policy.compute_loss)(params, for_loss, *data(for_data, 256))
        updates, optimiser_state = optimiser.update(gradient, optimiser_state)
        return (optax.apply_updates(params, updates), optimiser_state), None

    params = policy.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 1500)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, optimiser.init(params)))
    state = jnp.full((400, 1), 0.6)
    actions = policy.sample_actions(params, jax.random.key(2), state).mean((1, 2))
    assert (jnp.abs(jnp.abs(actions) - 0.6) < 0.2).mean() > 0.93
    assert 0.35 < (actions > 0).mean() < 0.65
    noise = jax.random.normal(jax.random.key(3), (1, 4, 1))
    one, two = (policy.sample_actions(params, jax.random.key(k), state[:1], noise=noise) for k in (4, 5))
    np.testing.assert_array_equal(one, two)  # the noise decides, not the key
