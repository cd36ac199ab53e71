"""Whole chunks sampled over a cache against the solver's formulas over a forward pass without one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import small
from tests.models.joint import joint_forward
from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.flow.processes import make_process
from vla_jax.serve.sampling import sample_actions


@pytest.mark.parametrize(("time", "method", "num_steps"), [("mlp", "euler", 10), ("adarms", "midpoint", 5)])
def test_cached_sampling_equals_uncached(time, method, num_steps):
    """Ten evaluations each; every one of the uncached ones reads images and text anew."""
    cfg = small.config(time=time)
    data = small.batch(cfg)
    model, params = small.init(cfg, data)
    keys = jax.random.split(jax.random.key(4), data.actions.shape[0])
    got = jax.jit(
        lambda params: sample_actions(
            params, data, keys=keys, model=model, process=make_process(ProcessConfig()),
            solver=SolverConfig(method=method, num_steps=num_steps), samples=1, plan_visible=False,
        )[:, 0]
    )(params)  # fmt: skip

    @jax.jit
    def velocity(x, t):
        return joint_forward(cfg, params, data, x, jnp.full(x.shape[0], t))[0]

    x = noise = jax.vmap(lambda key: jax.random.normal(key, data.actions.shape[1:]))(keys)
    grid = np.linspace(0, 1, num_steps + 1, dtype=np.float32)
    for t, end in itertools.pairwise(grid):
        dt = end - t  # float32: the network's clock turns by 1570 rad, so the times' last bits count
        if method == "midpoint":
            x = x + dt * velocity(x + dt / 2 * velocity(x, t), t + dt / 2)
        else:
            x = x + dt * velocity(x, t)
    valid = np.asarray(data.action_mask)
    assert np.abs(np.asarray(x - noise)[valid]).max() > 0.1
    np.testing.assert_allclose(np.asarray(got)[valid], np.asarray(x)[valid], rtol=0, atol=1e-5)
