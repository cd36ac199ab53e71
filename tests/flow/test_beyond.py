"""MeanFlow and the discrete masked process, each against a law that can be written down."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.flow.conftest import normal
from vla_jax.flow.masked import MaskedProcess
from vla_jax.flow.meanflow import Interval, MeanFlow, mean_velocity_target
from vla_jax.flow.oracle import GaussianMixture

GAUSS = dict(mean=0.7, std=0.4)


def flow_map(x, t, s):
    """Where the exact CondOT flow of N(0.7, 0.4^2) carries x from t to s."""

    def std(t):
        return jnp.sqrt((t * GAUSS["std"]) ** 2 + (1 - t) ** 2)

    return s * GAUSS["mean"] + (x - t * GAUSS["mean"]) * std(s) / std(t)


def mean_velocity(x, t, s):
    t, s = t[:, None], s[:, None]
    apart = s != t
    u = (flow_map(x, t, s) - x) / jnp.where(apart, s - t, 1)
    return jnp.where(apart, u, 0)


def test_mean_velocity_satisfies_its_equation():
    """u = v + (s - t) du/dt holds for the exact mean velocity along the exact velocity."""
    g = GaussianMixture(weights=jnp.ones(1), means=jnp.full((1, 1), 0.7), stds=jnp.full((1, 1), 0.4))
    x = normal(0, (50, 1))
    t = np.linspace(0, 0.9, 50)
    s = t + (1 - t) * np.linspace(0.1, 1, 50)

    @jax.jit
    def both(x, t, s):
        return mean_velocity_target(mean_velocity, Interval(x, t, s, g.velocity(x, t))), mean_velocity(
            x, t, s
        )

    np.testing.assert_allclose(*both(x, t, s), rtol=1e-9, atol=1e-10)


def test_one_step_is_exact():
    noise = normal(0, (6, 1))
    for steps in (1, 3):
        made = MeanFlow().sample(mean_velocity, jax.random.key(0), (6, 1), num_steps=steps, noise=noise)
        np.testing.assert_allclose(made.x, 0.7 + 0.4 * noise, rtol=1e-9)
        assert made.nfe == steps


def test_meanflow_examples_and_loss():
    a = jnp.ones((4000, 2, 3))
    c = jax.jit(MeanFlow().corrupt)(jax.random.key(0), a)
    few = jax.device_get(jax.tree.map(lambda x: x[:8], c))
    c, a = jax.device_get((c, a))
    assert (c.t <= c.s).all() and abs((c.t == c.s).mean() - 0.75) < 0.03
    noise = a - c.velocity
    u = c.t[:, None, None]
    np.testing.assert_allclose(c.x_t, (1 - u) * noise + u * a, rtol=1e-9, atol=1e-12)

    @jax.jit
    def loss(theta, few):
        return MeanFlow().loss(lambda x, t, s: theta * x * (s - t)[:, None, None], few)

    values = loss(0.3, few)
    assert values.shape == (8,) and (values < 1).all() and (values > 0).all()
    same = few._replace(s=few.t)  # s = t: flow matching
    target = jax.jit(lambda c: mean_velocity_target(lambda x, t, s: x, c))(same)
    np.testing.assert_array_equal(target, same.velocity)
    # The target is constant and the weight is too: the gradient is that of a plain weighted squared error.
    target = jax.jit(lambda c: mean_velocity_target(lambda x, t, s: 0.3 * x * (s - t)[:, None, None], c))(few)
    target = np.asarray(target)
    weight = 1 / (np.square(0.3 * few.x_t * (few.s - few.t)[:, None, None] - target).mean((1, 2)) + 0.01)

    slope = few.x_t * (few.s - few.t)[:, None, None]
    expected = (weight * (2 * (0.3 * slope - target) * slope).mean((1, 2))).sum()
    np.testing.assert_allclose(
        jax.jit(jax.grad(lambda p, few: loss(p, few).sum()))(0.3, few), expected, rtol=1e-9
    )


TABLE = np.array([[0.3, 0.05, 0.05], [0.0, 0.1, 0.2], [0.2, 0.0, 0.1]])  # p(first, second) of two tokens


def posterior(x, t):
    """Log-probability of each token given the unmasked ones; mask is 3."""
    tables = jnp.where(
        (x[:, 0] < 3)[:, None, None] & (jnp.arange(3)[None, :, None] != x[:, 0, None, None]), 0, TABLE
    )
    tables = jnp.where((x[:, 1] < 3)[:, None, None] & (jnp.arange(3) != x[:, 1, None, None]), 0, tables)
    margins = jnp.stack([tables.sum(2), tables.sum(1)], 1)
    return jnp.log(margins / margins.sum(-1, keepdims=True))


def test_masking_and_weights():
    process = MaskedProcess(vocabulary=3)
    tokens = jnp.zeros((50_000, 2), jnp.int32)
    corrupt = jax.jit(process.corrupt)
    c = jax.device_get(corrupt(jax.random.key(0), tokens, t=np.full(50_000, 0.7)))
    assert abs(c.masked.mean() - 0.3) < 0.01 and ((c.x_t == 3) == c.masked).all()
    ends = corrupt(jax.random.key(0), jnp.zeros((2, 2), jnp.int32), t=jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(ends.masked, [[True, True], [False, False]])
    assert np.isfinite(jax.jit(process.loss)(jnp.zeros((2, 2, 3)), ends)).all()


def test_bound_is_tight_for_the_exact_posterior():
    """E over data, t and masks of the loss = entropy of the data."""
    process = MaskedProcess(vocabulary=3)
    p = TABLE.ravel()
    entropy = -np.sum(p[p > 0] * np.log(p[p > 0]))

    @jax.jit
    def bound(key):
        draw, corrupt = jax.random.split(key)
        flat = jax.random.choice(draw, 9, (400_000,), p=p)
        c = process.corrupt(corrupt, jnp.stack(jnp.divmod(flat, 3), 1))
        return process.loss(posterior(c.x_t, c.t), c).sum(1).mean()

    np.testing.assert_allclose(bound(jax.random.key(0)), entropy, rtol=0.02)


def test_sampling_tokens():
    """Many steps draw from the joint table; one step draws the tokens independently, as its margins."""
    process = MaskedProcess(vocabulary=3)

    def law(steps):
        x = process.sample(posterior, jax.random.key(steps), (40_000, 2), steps)
        x = np.asarray(x)
        assert (x < 3).all()
        return np.bincount(3 * x[:, 0] + x[:, 1], minlength=9) / 40_000

    margins = np.outer(TABLE.sum(1), TABLE.sum(0)).ravel()
    assert np.abs(law(64) - TABLE.ravel()).sum() < 0.025
    assert np.abs(law(1) - margins).sum() < 0.02 < 0.2 < np.abs(margins - TABLE.ravel()).sum()
