"""What is small beside what it is added to, elsewhere than in LoRA: how much of it the types that are used leave."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.train.config import OptimConfig
from vla_jax.train.optim import make_optimizer
from vla_jax.train.step import averaging


def test_the_average_moves_by_a_ten_thousandth_in_float32():
    """Decay 0.9999, parameters that drift by 2.5e-5 a step: against float64 the average lags by nothing to speak of."""

    def run(dtype):
        def step(ema, i):
            p = jnp.asarray(0.5 + 2.5e-5 * i, dtype)
            decay = jnp.asarray(averaging(0.9999, i), dtype)
            return decay * ema + (1 - decay) * p, None

        return jax.lax.scan(step, jnp.asarray(0.0, dtype), jnp.arange(20_000))[0]

    with jax.enable_x64(True):
        exact = run(jnp.float64)
    moved = 2.5e-5 * 20_000
    assert abs(float(run(jnp.float32)) - float(exact)) < 2e-3 * moved


@pytest.mark.parametrize(("algorithm", "beta1", "near"), [("adamw", 0.9, 0.005), ("muon", 0.95, 0.02)])
def test_a_first_moment_in_bfloat16_gives_the_same_steps(algorithm, beta1, near):
    """optim.moment_dtype: noisy gradients of a fixed mean, a tenth of the noise, over 300 steps."""
    rng = np.random.default_rng(0)
    start = {"mlp": {"linear": jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)}}
    mean = 0.1 * rng.normal(size=(16, 16))
    gradients = jnp.asarray(mean + rng.normal(size=(300, 16, 16)), jnp.float32)

    def moved(dtype):
        config = OptimConfig(
            algorithm=algorithm,
            beta1=beta1,
            moment_dtype=dtype,
            weight_decay=0,
            warmup_fraction=0,
            clip_norm=1e9,
        )
        tx = make_optimizer(config, 300)

        def step(carry, given):
            params, state = carry
            i, g = given
            updates, state = tx.update({"mlp": {"linear": g}}, state, params, step=i)
            return (jax.tree.map(jnp.add, params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), (jnp.arange(300), gradients))
        return params["mlp"]["linear"] - start["mlp"]["linear"]

    whole, half = moved("float32"), moved("bfloat16")
    assert jnp.linalg.norm(half - whole) < near * jnp.linalg.norm(whole)


def test_an_update_at_the_smallest_rate_is_not_lost_in_float32():
    """2.5e-5 beside weights of 1, 200 times; trained parameters are float32 whatever the model's type is."""
    x = jnp.ones(1000, jnp.float32) * jnp.linspace(0.5, 2, 1000)
    found = jax.lax.fori_loop(0, 200, lambda i, x: x + jnp.float32(2.5e-5), x)
    chex.assert_trees_all_close(found - x, jnp.full(1000, 200 * 2.5e-5), rtol=5e-3)
