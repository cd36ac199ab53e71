"""Null prompts and clean prefixes in training: what they change, and that they change nothing where they are off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import small
from tests.objectives.found import losses_of
from tests.objectives.toy import Toy
from vla_jax.config import TrainConfig
from vla_jax.data.prompts import drop_prompts, null_prompt
from vla_jax.flow.config import ProcessConfig
from vla_jax.flow.processes import make_process
from vla_jax.models.config import VLAConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.objective import Objective
from vla_jax.objectives.terms.action import action_error
from vla_jax.types import Given

PROCESS = make_process(ProcessConfig())


def of(objective, model=Toy()) -> Objective:
    return Objective(model=model, process=PROCESS, config=objective)


def draw(key, data, objective):
    return of(objective).draw(jax.random.key(key), data)


@pytest.fixture(scope="module")
def setup():
    cfg = small.config()
    data = small.batch(cfg, b=4)
    model, params = small.init(cfg, data)
    return data, model, params


def test_a_dropped_prompt_keeps_its_ends_and_loses_its_target(setup):
    data, _, _ = setup
    null = null_prompt(data)
    prompt = np.asarray(data.token_mask & ~data.token_causal)
    for row in range(4):
        places = np.flatnonzero(prompt[row])
        np.testing.assert_array_equal(np.flatnonzero(null.token_mask[row]), [places[0], places[-1]])
    assert not null.token_loss.any()
    np.testing.assert_array_equal(null.tokens, data.tokens)


def test_prompts_are_dropped_sample_by_sample_at_the_given_rate(setup):
    data, _, _ = setup
    many = jax.tree.map(lambda x: jnp.repeat(x, 5000, axis=0), data)
    some = drop_prompts(jax.random.key(0), many, 0.1)
    dropped = (some.token_mask != many.token_mask).any(axis=1)
    assert abs(dropped.mean() - 0.1) < 0.01
    np.testing.assert_array_equal(some.token_mask[~dropped], many.token_mask[~dropped])
    np.testing.assert_array_equal(some.token_mask[dropped], null_prompt(many).token_mask[dropped])
    np.testing.assert_array_equal(drop_prompts(jax.random.key(0), data, 0.0).token_mask, data.token_mask)


def test_without_the_options_the_draws_are_what_they_were(setup):
    """Noise, times and visible plans do not depend on the new draws, so that old runs can be repeated."""
    data, _, _ = setup
    plain = draw(5, data, ObjectiveConfig(noise_draws=2))
    prefixed = draw(5, data, ObjectiveConfig(noise_draws=2, rtc_prefix=3))
    np.testing.assert_array_equal(plain.plan_visible, prefixed.plan_visible)
    plain, prefixed = plain.terms["action"], prefixed.terms["action"]
    assert plain.prefix is None
    for name in ("t", "target"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(prefixed, name))
    free = np.arange(plain.x_t.shape[2]) >= np.asarray(prefixed.prefix)[..., None]
    np.testing.assert_array_equal(plain.x_t[free], prefixed.x_t[free])
    clean = jnp.broadcast_to(jnp.where(data.action_mask, data.actions, 0)[:, None], plain.x_t.shape)
    np.testing.assert_array_equal(prefixed.x_t[~free], clean[~free])


def test_prefixes_are_uniform_up_to_the_limit(setup):
    data, _, _ = setup
    many = jax.tree.map(lambda x: jnp.repeat(x, 2000, axis=0), data)
    prefix = draw(0, many, ObjectiveConfig(rtc_prefix=3)).terms["action"].prefix
    np.testing.assert_allclose(np.bincount(prefix.ravel(), minlength=4) / prefix.size, 0.25, atol=0.02)


def test_the_loss_is_the_mean_over_what_follows_the_prefix(setup):
    """Against the expert called with a time per token: t = 1 and the data in the prefix, error behind it only."""
    data, model, params = setup
    objective = ObjectiveConfig(rtc_prefix=3, plan_visible=0.0)
    draws = draw(2, data, objective)
    counts = of(objective).counts(data, draws)
    got = jax.jit(lambda *xs: losses_of(of(objective, model), *xs))(params, data, draws, counts)
    draws = draws.terms["action"]

    horizon = draws.x_t.shape[2]
    first = np.asarray(draws.prefix[:, 0])
    assert len({*first}) > 1
    inside = np.arange(horizon) < first[:, None]
    t = jnp.where(inside, 1.0, draws.t)

    @jax.jit
    def predict(x_t, t):
        context, _ = model.apply({"params": params}, data, jnp.zeros(4, bool), method="prefill")
        return model.apply({"params": params}, context, Given.of(data), x_t, t, method="denoise")

    prediction = predict(draws.x_t[:, 0], t)
    mask = np.asarray(data.action_mask) & ~inside[..., None]
    squared = (np.asarray(prediction) - np.asarray(draws.target[:, 0])) ** 2
    np.testing.assert_allclose(got.action, squared[mask].mean(), rtol=1e-5)
    assert counts["action"] == mask.sum() and got.elements_by_time.sum() == mask.sum()


def test_a_prefix_that_is_not_learned_still_is_seen(setup):
    data, model, params = setup
    objective = ObjectiveConfig(rtc_prefix=3, plan_visible=0.0)
    drawn = draw(2, data, objective)
    draws = drawn.terms["action"]
    row = int(np.argmax(draws.prefix[:, 0]))

    @jax.jit
    def error_of(x_t):
        reading = of(objective, model).read(params, data, drawn)
        return action_error(reading, draws._replace(x_t=x_t))

    error, other = (error_of(x) for x in (draws.x_t, draws.x_t.at[row, 0, 0].add(1.0)))
    assert (error[row, 0, : int(draws.prefix[row, 0])] == 0).all()
    assert np.abs(error[row] - other[row]).max() > 1e-6


def test_prefixes_that_cannot_be_are_refused():
    flow = TrainConfig(objective=ObjectiveConfig(rtc_prefix=4))
    with pytest.raises(ValueError, match=r"needs process\.kind=flow"):
        dataclasses.replace(flow, process=ProcessConfig(kind="regression"))
    with pytest.raises(ValueError, match="leaves nothing of chunks of 4"):
        dataclasses.replace(flow, model=VLAConfig(expert=JointConfig(horizon=4)))
    for wrong in ({"rtc_prefix": -1}, {"prompt_dropout": 1.0}, {"prompt_dropout": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ObjectiveConfig(**wrong)
