"""One step on a small VLA: microbatches, the average, steps that are not finite, randomness."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models import small
from vla_jax.config import TrainConfig
from vla_jax.data.augment import AugmentConfig
from vla_jax.flow.processes import make_process
from vla_jax.models.vla import VLA
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.train.config import LoopConfig, OptimConfig
from vla_jax.train.optim import learning_rate, make_optimizer, updates_applied
from vla_jax.train.state import TrainState
from vla_jax.train.step import add_up, averaging, make_eval_step, make_train_step

# Unlike Adam it shows the size of gradients; its count is the one by which the average warms up.
TX = optax.chain(optax.sgd(1.0), optax.scale_by_schedule(lambda count: 0.1))


def config(accumulate: int = 1, augment: AugmentConfig = AugmentConfig()) -> TrainConfig:
    return TrainConfig(
        seed=3,
        objective=ObjectiveConfig(noise_draws=2, plan_visible=0.5),
        augment=augment,
        train=LoopConfig(batch_size=4, accumulate=accumulate, ema_decay=0.9),
    )


@functools.cache
def setup():
    cfg = small.config()
    data = small.batch(cfg, b=4)
    data = data.replace(token_loss=data.token_loss.at[0].set(False))  # halves of unequal text
    model, params = small.init(cfg, data)
    return data, model, params


def state_of(params, step: int = 0) -> TrainState:
    ema = jax.tree.map(lambda x: x + 1, params)
    return TrainState(step=jnp.int32(step), params=params, ema=ema, opt_state=TX.init(params))


@functools.cache
def step_of(cfg: TrainConfig):
    _, model, _ = setup()
    return jax.jit(make_train_step(model, make_process(cfg.process), cfg, TX))


def test_microbatches_equal_the_whole_batch():
    """Ragged masks in every microbatch, the same noise: the same update and metrics."""
    data, _, params = setup()
    want, want_metrics = step_of(config())(state_of(params), data)
    got, got_metrics = step_of(config(accumulate=2))(state_of(params), data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got.params, want.params)
    for name, value in want_metrics.items():
        np.testing.assert_allclose(got_metrics[name], value, rtol=1e-4, atol=1e-7, err_msg=name)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), want.params, params)
    still = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, change in jax.tree_util.tree_leaves_with_path(moved)
        if change < 1e-6
    ]
    # Every parameter gets a gradient, but for what softmax does not notice: a shift common to all keys.
    assert all(name.endswith("key/bias") for name in still), still


def test_bfloat16_computes_near_float32_and_keeps_parameters_logits_and_losses_in_it():
    """Parameters, optimiser state, logits, losses and gradients stay float32; what lies between has 8 bits."""
    data, model, params = setup()
    half = VLA(dataclasses.replace(model.config, dtype="bfloat16"))
    t = jnp.linspace(0.1, 0.9, 4)
    forward = jax.jit(
        lambda params, model: model.apply({"params": params}, data, data.actions, t), static_argnums=1
    )
    cache, _ = jax.eval_shape(lambda params: half.apply({"params": params}, data, method="prefill"), params)
    assert cache.kv.keys.dtype == cache.kv.values.dtype == jnp.bfloat16
    valid = {0: np.asarray(data.action_mask), 1: np.asarray(data.token_mask)}
    for i, (got, want) in enumerate(zip(forward(params, half), forward(params, model))):
        assert got.dtype == jnp.float32
        error, size = np.asarray(got - want)[valid[i]], np.asarray(want)[valid[i]]
        assert 0 < np.sqrt(np.mean(error**2)) < 0.03 * np.sqrt(np.mean(size**2))

    cfg = config()
    step = jax.jit(make_train_step(half, make_process(cfg.process), cfg, TX))
    new, metrics = step(state_of(params), data)
    want, want_metrics = step_of(cfg)(state_of(params), data)
    assert {x.dtype for x in jax.tree.leaves((new.params, new.ema, metrics))} == {jnp.dtype("float32")}
    for name in ("loss", "text_loss", "action_loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=0.05, err_msg=name)
    moved, expected = (
        np.concatenate([np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (state.params, params)))])
        for state in (new, want)
    )
    assert np.dot(moved, expected) > 0.99 * np.linalg.norm(moved) * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("updates", "decay"), [(0, 0.1), (10, 11 / 20), (79, 80 / 89), (81, 0.9), (10_000, 0.9)]
)
def test_average_follows_the_parameters(updates, decay):
    """It is warmed up by the updates that were applied; the run's step may be further, by skipped ones."""
    data, _, params = setup()
    state = state_of(params, step=10_000)
    sgd, _ = state.opt_state
    state = dataclasses.replace(state, opt_state=(sgd, optax.ScaleByScheduleState(jnp.int32(updates))))
    new, _ = step_of(config())(state, data)
    expected = jax.tree.map(lambda old, p: decay * old + (1 - decay) * p, state.ema, new.params)
    chex.assert_trees_all_close(new.ema, expected, rtol=1e-5, atol=1e-6)
    assert new.step == 10_001


def test_of_a_short_run_the_average_is_not_its_start():
    """200 updates of parameters that have arrived, from a start 1 away; a constant 0.999 would leave 0.82 of it."""
    left = np.prod([float(averaging(0.999, jnp.int32(n))) for n in range(200)])
    assert left < 1e-9 and float(averaging(0.999, jnp.int32(20_000))) == np.float32(0.999)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count():
    data, _, params = setup()
    state = state_of(params, step=7)
    bad = data.replace(state=data.state.at[1, 0].set(jnp.nan))
    new, metrics = step_of(config())(state, bad)
    assert metrics["skipped"] == 1
    assert new.step == 8
    for part in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, part), getattr(state, part))
    _, metrics = step_of(config())(state, data)
    assert metrics["skipped"] == 0


def test_steps_that_are_skipped_do_not_shift_the_learning_rate():
    """Ten steps, four of them without a finite loss: each update is at the rate that is logged for its step."""
    data, model, params = setup()
    optim = OptimConfig(
        learning_rate=1e-2, eps=1e-30, weight_decay=0.0, warmup_fraction=1.0, clip_norm=1e30, beta1=0.0
    )
    cfg = dataclasses.replace(config(), optim=optim)
    tx, rate = make_optimizer(optim, 10), learning_rate(optim, 10)
    step = jax.jit(make_train_step(model, make_process(cfg.process), cfg, tx))
    state = dataclasses.replace(state_of(params), ema=params, opt_state=tx.init(params))
    bad = data.replace(state=data.state.at[1, 0].set(jnp.nan))
    for i in range(10):
        before, (state, metrics) = state, step(state, bad if i in (1, 2, 5, 8) else data)
        if metrics["skipped"]:
            continue
        name = ("expert", "action_out_proj", "bias")
        first = jnp.max(jnp.abs(leaf_of(state.params, name) - leaf_of(before.params, name)))
        wanted = rate(i) * largest_direction(state, name)
        np.testing.assert_allclose(first, wanted, rtol=1e-3, err_msg=f"step {i}")
    assert updates_applied(state.opt_state) == 6 and state.step == 10


def leaf_of(tree, names):
    return functools.reduce(lambda node, name: node[name], names, tree)


def largest_direction(after: TrainState, name) -> float:
    """|m| / √v̂, the largest entry: what the rate multiplies. beta1 is 0, so that m is the gradient."""
    mu, nu = (leaf_of(optax.tree.get(after.opt_state, moment), name) for moment in ("mu", "nu"))
    count = int(updates_applied(after.opt_state))
    return float(jnp.max(jnp.abs(mu) / jnp.sqrt(nu / (1 - OptimConfig().beta2 ** count))))


def test_a_spike_changes_nothing_but_count_and_memory():
    data, _, params = setup()
    cfg = config()
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, spike_sigma=6.0, spike_window=4))
    loss = float(step_of(cfg)(with_memory(params, 0.0, count=0), data)[1]["loss"])
    for usual, spiked in ((loss - 1, 1), (loss, 0)):
        state = with_memory(params, usual, count=2)
        new, metrics = step_of(cfg)(state, data)
        assert (metrics["spiked"], metrics["skipped"], new.step) == (spiked, 0, 1)
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new.params, state.params)
        assert (max(jax.tree.leaves(moved)) == 0) == bool(spiked)
        assert new.spikes["count"] == 3 and float(new.spikes["values"][0, 2]) == pytest.approx(loss, rel=1e-4)


def with_memory(params, usual: float, count: int) -> TrainState:
    values = jnp.stack([usual + 0.01 * jnp.arange(4), jnp.full(4, 1e6) + jnp.arange(4)])
    return dataclasses.replace(state_of(params), spikes={"values": values, "count": jnp.int32(count)})


def test_randomness_is_a_function_of_seed_and_step():
    data, _, params = setup()
    cfg = config(augment=AugmentConfig(shift=2))
    losses = [float(step_of(cfg)(state_of(params, step), data)[1]["loss"]) for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    other = step_of(dataclasses.replace(cfg, seed=4))(state_of(params), data)[1]["loss"]
    assert float(other) != losses[0]


def test_validation_is_the_mean_over_all_batches_elements():
    """Two batches of different masks weigh by their elements, not by their number."""
    data, model, params = setup()
    cfg = config()
    evaluate = jax.jit(make_eval_step(model, make_process(cfg.process), cfg))
    halves = [jax.tree.map(lambda x: x[rows], data) for rows in (slice(0, 2), slice(2, 4))]
    sums = [evaluate(params, half, jax.random.key(0)) for half in halves]
    got = add_up(sums)
    assert sums[0].counts["text"] != sums[1].counts["text"]
    text = sum(float(s.sums["text"].loss) for s in sums) / float(data.token_loss.sum())
    action = sum(float(s.sums["action"].loss) for s in sums) / (2 * float(data.action_mask.sum()))
    np.testing.assert_allclose(got["text_loss"], text, rtol=1e-6)
    np.testing.assert_allclose(got["action_loss"], action, rtol=1e-6)


@pytest.mark.parametrize("name", ["time_histogram", "action_loss_by_time"])
def test_times_are_reported(name):
    data, _, params = setup()
    _, metrics = step_of(config())(state_of(params), data)
    assert metrics[name].shape == (10,)
    if name == "time_histogram":
        assert metrics[name].sum() == 8  # 4 samples, 2 draws each
