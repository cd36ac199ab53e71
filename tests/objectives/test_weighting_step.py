"""λ policies in the training step, on a model of a few matrices: what λ means, and what is remembered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.objectives.toy import Process, Toy, batch_of, config, params_of
from vla_jax.checkpoint import Checkpoints
from vla_jax.config import TrainConfig
from vla_jax.objectives.config import DiagnosticsConfig, ObjectiveConfig
from vla_jax.objectives.weighting import WeightingConfig
from vla_jax.objectives.weighting.config import OPTIONS
from vla_jax.train.config import LoopConfig
from vla_jax.train.optim import make_optimizer
from vla_jax.train.run import check_trunks, check_weighting_state
from vla_jax.train.state import TrainState
from vla_jax.train.step import make_train_step
from vla_jax.train.weigh import policy_of
from vla_jax.types import Batch


@functools.cache
def step_of(cfg: TrainConfig):
    return jax.jit(make_train_step(Toy(), Process(), cfg, make_optimizer(cfg.optim, cfg.train.steps)))


def start(cfg: TrainConfig, params=None) -> TrainState:
    params = params_of() if params is None else params
    tx = make_optimizer(cfg.optim, cfg.train.steps)
    return TrainState(
        step=jnp.int32(0), params=params, ema=None, opt_state=tx.init(params), weighting=policy_of(cfg).init()
    )


def run(cfg: TrainConfig, batch: Batch, steps=3, state=None):
    state, metrics = start(cfg) if state is None else state, {}
    for _ in range(steps):
        state, metrics = step_of(cfg)(state, batch)
    return state, metrics


@pytest.mark.parametrize(("clip", "same"), [("per_group", True), ("global", False)])
def test_under_insulation_lambda_reaches_the_backbone_through_a_global_clip_only(clip, same):
    """Adam, κ = 0, λ = 1 and λ = 10: the backbones agree bit for bit, unless one norm clips both groups."""
    backbones = [
        run(config(ObjectiveConfig(insulation=0.0, action_weight=weight), clip=clip), batch_of(), steps=4)[0]
        for weight in (1.0, 10.0)
    ]
    one, ten = (jax.tree.leaves(state.params["backbone"]) for state in backbones)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(one, ten)) is same


POLICIES = [WeightingConfig(policy=name) for name in OPTIONS if name not in ("step", "linear")]
POLICIES += [
    WeightingConfig(policy="linear", start=0.5, begin=0.0),
    WeightingConfig(policy="step", begin=0.25),
]


@pytest.mark.parametrize("weighting", POLICIES, ids=lambda w: w.policy)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(
    weight=st.sampled_from([0.1, 3.0]),
    reductions=st.tuples(*[st.sampled_from(["mean", "sum"])] * 2),
    copies=st.integers(1, 2),
    empty=st.sampled_from([0, 4]),
    accumulate=st.sampled_from([1, 2, 4]),
    tokens=st.integers(0, 2),
    horizon=st.integers(0, 2),
)
def test_lambda_means_the_same(weighting, weight, reductions, copies, empty, accumulate, tokens, horizon):
    """More copies of a batch, padding of texts, chunks and samples, and microbatches change nothing."""
    objective = ObjectiveConfig(
        action_weight=weight,
        weighting=weighting,
        text_reduction=reductions[0],
        action_reduction=reductions[1],
        insulation=0.5,
    )
    data = batch_of()

    def pad(x, *widths):
        return jnp.pad(x, [(0, w) for w in widths] + [(0, 0)] * (x.ndim - len(widths)))

    text = {
        n: pad(getattr(data, n), 0, tokens) for n in ("tokens", "token_mask", "token_causal", "token_loss")
    }
    chunk = {n: pad(getattr(data, n), 0, horizon) for n in ("actions", "action_mask")}
    other = jax.tree.map(lambda x: pad(jnp.concatenate([x] * copies), empty), data.replace(**text, **chunk))

    cfg = config(objective)
    want, want_metrics = run(cfg, data)
    got, got_metrics = run(config(objective, accumulate=accumulate), other)
    names = ("text_loss", "action_loss", "loss", "grad_norm", "text_weight", "action_weight")
    for name in names if "text_weight" in want_metrics else names[:4]:
        np.testing.assert_allclose(got_metrics[name], want_metrics[name], rtol=2e-4, atol=1e-6, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), got.weighting, want.weighting
    )


def test_reduction_states_what_lambda_multiplies():
    """The sum over a sample is its mean times its length: λ per element or per chunk, by hand."""
    data = batch_of()
    cfg = config(ObjectiveConfig(action_weight=2.0, text_reduction="sum", action_reduction="sum"))
    _, metrics = run(cfg, data, steps=1)
    text = metrics["text_loss"] * data.token_loss.sum() / 4
    action = metrics["action_loss"] * data.action_mask.sum() / 4
    np.testing.assert_allclose(metrics["loss"], text + 2 * action, rtol=1e-5)


def test_while_lambda_is_zero_the_expert_is_not_run():
    """A NaN of the expert does not reach the backbone before λ leaves 0, and stops the step after."""
    cfg = config(ObjectiveConfig(action_weight=10.0, weighting=WeightingConfig(policy="step", begin=0.5)))
    params = params_of()
    params["expert"]["x"] *= jnp.nan
    state, metrics = run(cfg, batch_of(), steps=2, state=start(cfg, params))
    assert metrics["skipped"] == 0 and metrics["action_weight"] == 0 and np.isnan(metrics["action_loss"])
    assert (state.params["backbone"]["mix"] != params["backbone"]["mix"]).any()
    _, metrics = step_of(cfg)(state, batch_of())
    assert metrics["action_weight"] == 10 and metrics["skipped"] == 1


def test_a_skipped_step_leaves_the_policy_as_it_was():
    cfg = config(ObjectiveConfig(weighting=WeightingConfig(policy="gradnorm")))
    state, _ = run(cfg, batch_of(), steps=2)
    bad = batch_of().replace(state=batch_of().state * jnp.nan)
    after, metrics = step_of(cfg)(state, bad)
    assert metrics["skipped"] == 1 and after.step == 3
    jax.tree.map(np.testing.assert_array_equal, after.weighting, state.weighting)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_restored_policy_goes_on_bit_for_bit(name, tmp_path):
    cfg = config(ObjectiveConfig(weighting=WeightingConfig(policy=name)))
    half, _ = run(cfg, batch_of(), steps=2)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, half.items(), {"config": {}})
    checkpoints.wait()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), half.items())
    restored = checkpoints.restore_latest(shapes, same={})
    checkpoints.close()
    again = TrainState.from_items(jnp.int32(2), restored.items)
    want, got = (run(cfg, batch_of(), steps=2, state=s)[0] for s in (half, again))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    check_weighting_state(tmp_path, cfg)


def test_a_checkpoint_without_the_policys_state_is_one_line(tmp_path):
    check_weighting_state(tmp_path, config(ObjectiveConfig(weighting=WeightingConfig(policy="gradnorm"))))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, {"params": params_of()}, {"config": {}})
    checkpoints.close()
    for name in ("fixed", "pcgrad"):  # they remember nothing
        check_weighting_state(tmp_path, config(ObjectiveConfig(weighting=WeightingConfig(policy=name))))
    with pytest.raises(ValueError, match=r"checkpoint 2 of .* has no state of .*policy=gradnorm") as error:
        check_weighting_state(tmp_path, config(ObjectiveConfig(weighting=WeightingConfig(policy="gradnorm"))))
    assert "\n" not in str(error.value)


def test_a_trunk_that_is_not_there_is_refused_before_anything_is_compiled():
    objective = ObjectiveConfig(weighting=WeightingConfig(policy="mgda", trunk=("backbon/mix",)))
    with pytest.raises(
        ValueError, match=r"objective.weighting.trunk .*: .*'backbon/mix'; did you mean 'backbone/mix'"
    ):
        check_trunks(objective, params_of())
    objective = ObjectiveConfig(diagnostics=DiagnosticsConfig(every=10, trunk=("exprt",)))
    with pytest.raises(ValueError, match=r"objective.diagnostics.trunk .*: .*did you mean 'expert'"):
        check_trunks(objective, params_of())


def test_diagnostics_every_second_step():
    """Null between; where compared, λ_eff is the ratio of the weighted gradients; parameters do not notice."""
    objective = ObjectiveConfig(weighting=WeightingConfig(policy="gradient_ratio"), action_weight=0.3)
    watched = dataclasses.replace(objective, diagnostics=DiagnosticsConfig(every=2, stride=1))
    first, metrics = run(config(watched), batch_of(), steps=1)
    assert np.isnan(metrics["diagnostics/ratio"])
    watched_state, metrics = run(config(watched), batch_of(), steps=1, state=first)
    np.testing.assert_allclose(metrics["diagnostics/ratio"], 0.3, rtol=1e-4)
    assert metrics["diagnostics/cosine_by_time"].shape == (4,)
    plain, _ = run(config(objective), batch_of(), steps=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), watched_state.params, plain.params)
    off = dataclasses.replace(config(watched), train=LoopConfig(log_every=10))
    with pytest.raises(ValueError, match=r"every=2 is not a multiple of train\.log_every=10"):
        step_of(off)


def test_diagnostics_that_are_off_are_not_in_the_program():
    """The very same program as without them, whatever else they are set to; on, it is another one."""
    cfg, data = config(ObjectiveConfig()), batch_of()

    def text(diagnostics):
        objective = dataclasses.replace(cfg.objective, diagnostics=diagnostics)
        one = dataclasses.replace(cfg, objective=objective)
        step = make_train_step(Toy(), Process(), one, make_optimizer(cfg.optim, cfg.train.steps))
        return jax.jit(step).lower(start(cfg), data).as_text()

    plain = text(DiagnosticsConfig())
    assert text(DiagnosticsConfig(every=0, time_bins=9, stride=1, trunk=("nowhere",))) == plain
    assert text(DiagnosticsConfig(every=2)) != plain
