"""The optimiser against formulas written out in numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vla_jax.train.config import LoopConfig, OptimConfig
from vla_jax.train.optim import decays, learning_rate, make_optimizer


def test_schedule_warms_up_holds_and_falls():
    config = OptimConfig(learning_rate=2.0, warmup_fraction=0.1, hold_fraction=0.2, final_fraction=0.25)
    lr = np.asarray([learning_rate(config, 100)(jnp.int32(i)) for i in range(100)])
    np.testing.assert_allclose(lr[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(lr[10:31], 2.0, rtol=1e-6)
    np.testing.assert_allclose(lr[65], 2.0 * (0.25 + 0.75 / 2), rtol=1e-6)  # halfway down
    assert lr[-1] == pytest.approx(0.5, rel=2e-3)
    assert (np.diff(lr[30:]) < 0).all()


def params():
    return {
        "backbone": {
            "w": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
            "input_embedding": jnp.ones((4, 2)),
        },
        "expert": {"norm": {"scale": jnp.ones(3)}, "q_einsum": {"w": jnp.ones((2, 2))}},
    }


def test_only_matrices_decay():
    assert decays(params()) == {
        "backbone": {"w": {"kernel": True, "bias": False}, "input_embedding": False},
        "expert": {"norm": {"scale": False}, "q_einsum": {"w": True}},
    }
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, warmup_fraction=0, hold_fraction=1)
    tx = make_optimizer(config, 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params()), tx.init(params()), params(), step=0)
    np.testing.assert_allclose(updates["backbone"]["w"]["kernel"], -0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["expert"]["norm"]["scale"], 0)


def adam_in_numpy(grads, config):
    """Bias-corrected Adam on a constant learning rate, float64."""
    m = v = x = np.zeros_like(grads[0], np.float64)
    for i, g in enumerate(grads, 1):
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        step = (m / (1 - config.beta1**i)) / (np.sqrt(v / (1 - config.beta2**i)) + config.eps)
        x = x - config.learning_rate * step
    return x


@pytest.mark.parametrize("clip", ["global", "per_group"])
def test_clip_and_adam_against_numpy(clip):
    config = OptimConfig(
        learning_rate=0.1, weight_decay=0, warmup_fraction=0, hold_fraction=1, clip=clip, clip_norm=1.0
    )
    rng = np.random.default_rng(0)
    small, big = rng.normal(size=(5, 3)) * 0.1, rng.normal(size=(5, 4)) * 30
    tx = make_optimizer(config, 10)
    x = {"backbone": {"w": jnp.zeros(3)}, "expert": {"w": jnp.zeros(4)}}
    state = tx.init(x)
    for i, (g, h) in enumerate(zip(small, big)):
        grads = {"backbone": {"w": jnp.asarray(g)}, "expert": {"w": jnp.asarray(h)}}
        updates, state = tx.update(grads, state, x, step=i)
        x = optax.apply_updates(x, updates)

    def clipped(g, norm):
        return g / max(norm, 1.0)

    both = [np.sqrt((g**2).sum() + (h**2).sum()) for g, h in zip(small, big)]
    for name, own in (("backbone", small), ("expert", big)):
        norms = both if clip == "global" else [np.linalg.norm(g) for g in own]
        expected = adam_in_numpy([clipped(g, n) for g, n in zip(own, norms)], config)
        np.testing.assert_allclose(x[name]["w"], expected, rtol=2e-5, atol=1e-6)


def test_first_moment_in_bfloat16():
    tx = make_optimizer(OptimConfig(moment_dtype="bfloat16"), 10)
    adam = tx.init(params())[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}


def test_decay_mask_sees_through_boxes():
    boxed = jax.tree.map(lambda x: nn.LogicallyPartitioned(x, (None,) * x.ndim), params())
    assert jax.tree.leaves(decays(boxed)) == jax.tree.leaves(decays(params()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimConfig(beta1=1.0), "optim.beta1=1.0"),
        (lambda: OptimConfig(warmup_fraction=0.7, hold_fraction=0.5), "is more than 1"),
        (lambda: OptimConfig(clip_norm=0), "clip_norm=0"),
        (lambda: LoopConfig(batch_size=9, accumulate=2), "use 10"),
        (lambda: LoopConfig(ema_decay=1.0), "ema_decay=1.0"),
        (lambda: LoopConfig(val_batches=0), "val_every=0"),
        (lambda: LoopConfig(keep=0), "train.keep=0"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
