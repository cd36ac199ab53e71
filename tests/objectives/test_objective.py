"""The loss against plain numpy, and what λ, masks, accumulation and insulation promise."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import small
from tests.models.test_action_tokens import with_action_tokens
from tests.objectives.found import losses_of
from tests.objectives.test_cross_entropy import avals
from tests.objectives.toy import Toy
from vla_jax.flow.config import ProcessConfig
from vla_jax.flow.processes import make_process
from vla_jax.models.vla import VLA
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.objective import Objective
from vla_jax.train.parts import init_params

PROCESS = make_process(ProcessConfig())


@pytest.fixture(scope="module")
def setup():
    cfg = small.config()
    data = small.batch(cfg, b=4)
    model, params = small.init(cfg, data)
    return data, model, params


def of(objective, model=Toy(), **options) -> Objective:
    return Objective(model=model, process=PROCESS, config=objective, **options)


def draw(key, data, objective):
    return of(objective).draw(jax.random.key(key), data)


def count(data, objective, draws=None):
    return of(objective).counts(data, draw(0, data, objective) if draws is None else draws)


def losses(model, params, data, objective=ObjectiveConfig(), *, key=0, draws=None, counts=None, **kwargs):
    draws = draw(key, data, objective) if draws is None else draws
    counts = counts or count(data, objective, draws)
    return _losses(model, objective, tuple(kwargs.items()))(params, data, draws, counts)


@functools.cache
def _losses(model, objective, kwargs):
    return jax.jit(functools.partial(losses_of, of(objective, model, **dict(kwargs))))


@functools.cache
def _gradient(model, objective, term):
    def loss(params, data, draws):
        return getattr(
            losses_of(of(objective, model), params, data, draws, count(data, objective, draws)), term
        )

    return jax.jit(jax.value_and_grad(loss))


def gradient(model, params, data, term, objective=ObjectiveConfig(), key=0):
    return _gradient(model, objective, term)(params, data, draw(key, data, objective))


def test_equals_numpy(setup):
    """CE and FM written out: means over valid tokens and elements of the whole batch, λ between them."""
    data, model, params = setup
    objective = ObjectiveConfig(action_weight=3.0, plan_visible=0.0)
    draws = draw(0, data, objective)
    got = losses(model, params, data, objective, draws=draws)
    noisy = draws.terms["action"]
    x_t = noisy.x_t[:, 0]
    prediction, logits = jax.jit(model.apply)({"params": params}, data, x_t, noisy.t[:, 0])
    logits = np.asarray(logits, np.float64)
    total = n = right = 0
    for row in range(4):
        for i in range(1, data.tokens.shape[1]):
            if data.token_loss[row, i]:
                z = logits[row, i - 1]
                total += np.log(np.exp(z - z.max()).sum()) + z.max() - z[data.tokens[row, i]]
                right += z.argmax() == data.tokens[row, i]
                n += 1
    mask = np.asarray(data.action_mask)
    squared = (np.asarray(prediction) - np.asarray(noisy.target[:, 0])) ** 2
    np.testing.assert_allclose(got.text, total / n, rtol=1e-5)
    np.testing.assert_allclose(got.text_accuracy, right / n, rtol=1e-6)
    np.testing.assert_allclose(got.action, squared[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(got.total, total / n + 3 * squared[mask].mean(), rtol=1e-5)
    assert got.time_histogram.sum() == 4
    np.testing.assert_allclose(got.action_by_time.sum(), squared[mask].sum(), rtol=1e-5)
    assert got.elements_by_time.sum() == mask.sum()


def test_padded_dims_are_learned_where_asked(setup):
    """With `padding_loss` all dims of valid steps have a loss, towards zero; steps behind the end have none."""
    data, model, params = setup
    model = VLA(small.replace_expert(model.config, padding="noise"))
    data = data.replace(action_mask=data.action_mask.at[..., 2].set(False))
    steps = np.asarray(data.action_mask).any(axis=-1)
    assert not steps.all()
    for objective, mask in (
        (ObjectiveConfig(plan_visible=0.0), np.asarray(data.action_mask)),
        (ObjectiveConfig(plan_visible=0.0, padding_loss=True), np.repeat(steps[..., None], 3, axis=-1)),
    ):
        draws = draw(0, data, objective)
        got = losses(model, params, data, objective, draws=draws)
        noisy = draws.terms["action"]
        x_t, t, target = noisy.x_t[:, 0], noisy.t[:, 0], np.asarray(noisy.target[:, 0])
        noise = np.asarray(x_t)[..., 2] / (1 - np.asarray(t))[:, None]  # x_t = (1 - t) noise + t · 0
        np.testing.assert_allclose(target[..., 2], -noise, rtol=1e-4, atol=1e-5)
        assert np.abs(noise).max() > 1
        prediction, _ = jax.jit(model.apply)({"params": params}, data, x_t, t)
        squared = (np.asarray(prediction) - target) ** 2
        np.testing.assert_allclose(got.action, squared[mask].mean(), rtol=1e-5)
        np.testing.assert_allclose(got.action_by_time.sum(), squared[mask].sum(), rtol=1e-5)
        assert got.elements_by_time.sum() == mask.sum() == count(data, objective)["action"]
        summed = dataclasses.replace(objective, action_reduction="sum")
        np.testing.assert_allclose(of(summed).scales(data)["action"], mask.sum() / 4, rtol=1e-6)
        prefixed = dataclasses.replace(objective, rtc_prefix=3)
        draws = draw(0, data, prefixed)
        behind = np.arange(steps.shape[1]) >= np.asarray(draws.terms["action"].prefix)
        assert 0 < count(data, prefixed, draws)["action"] == (mask & behind[..., None]).sum() < mask.sum()


def test_targets_are_the_clean_velocity(setup):
    """x_t and the target determine noise and data: a = x_t + (1 - t) v; masked elements count as zero."""
    data, _, _ = setup
    objective = ObjectiveConfig(noise_draws=3)
    d = draw(1, data, objective).terms["action"]
    recovered = d.x_t + (1 - d.t[..., None, None]) * d.target
    want = jnp.where(data.action_mask, data.actions, 0)[:, None]
    np.testing.assert_allclose(recovered, jnp.broadcast_to(want, recovered.shape), atol=1e-5)
    assert np.unique(np.asarray(d.t)).size == 12


def test_modalities_do_not_touch_each_other(setup):
    """Other action targets leave the text loss and its gradient bit-identical, and the other way round."""
    data, model, params = setup
    other = data.replace(actions=data.actions + 1.7)
    (want, want_grad), (got, got_grad) = (gradient(model, params, d, "text") for d in (data, other))
    assert want == got
    jax.tree.map(np.testing.assert_array_equal, want_grad, got_grad)
    assert gradient(model, params, other, "action")[0] != gradient(model, params, data, "action")[0]

    # Another target text is seen by the expert only where the plan is visible.
    objective = ObjectiveConfig(plan_visible=0.0)
    other = data.replace(tokens=jnp.where(data.token_loss, (data.tokens * 7) % small.VOCAB, data.tokens))
    (want, want_grad), (got, got_grad) = (
        gradient(model, params, d, "action", objective) for d in (data, other)
    )
    assert want == got
    jax.tree.map(np.testing.assert_array_equal, want_grad, got_grad)
    assert gradient(model, params, other, "text")[0] != gradient(model, params, data, "text")[0]
    seen = ObjectiveConfig(plan_visible=1.0)
    assert (
        gradient(model, params, other, "action", seen)[0] != gradient(model, params, data, "action", seen)[0]
    )


def test_masked_elements_change_nothing(setup):
    data, model, params = setup
    other = data.replace(
        actions=jnp.where(data.action_mask, data.actions, jnp.nan),
        tokens=jnp.where(data.token_mask, data.tokens, 3),
    )
    want, got = losses(model, params, data), losses(model, params, other)
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_microbatches_add_up(setup):
    """Shares of ragged microbatches sum to the loss of the whole batch."""
    data, model, params = setup
    objective = ObjectiveConfig(noise_draws=2)
    draws = draw(0, data, objective)
    counts = count(data, objective)
    want = losses(model, params, data, objective, draws=draws, counts=counts)
    parts = [
        losses(
            model,
            params,
            *[jax.tree.map(lambda x: x[i::2], data), objective],
            draws=jax.tree.map(lambda x: x[i::2], draws),
            counts=counts,
        )
        for i in range(2)
    ]
    got = jax.tree.map(jnp.add, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_lambda_does_not_depend_on_batch_or_padding(setup):
    """A batch twice over, or padded, has the same loss."""
    data, model, params = setup
    draws = draw(0, data, ObjectiveConfig())
    want = losses(model, params, data, draws=draws)
    double = losses(
        model,
        params,
        jax.tree.map(lambda x: jnp.concatenate([x, x]), data),
        draws=jax.tree.map(lambda x: jnp.concatenate([x, x]), draws),
    )
    np.testing.assert_allclose(double[:4], want[:4], rtol=1e-5)
    pad = {
        n: jnp.pad(getattr(data, n), ((0, 0), (0, 3)))
        for n in ("tokens", "token_mask", "token_causal", "token_loss")
    }
    padded = losses(model, params, data.replace(**pad), draws=draws)
    np.testing.assert_allclose(padded[:4], want[:4], rtol=1e-5)


def test_insulation_scales_the_backbones_gradient(setup):
    data, model, params = setup
    grads = {
        kappa: gradient(model, params, data, "action", ObjectiveConfig(insulation=kappa))[1]
        for kappa in (0.0, 0.5, 1.0)
    }
    norms = {
        kappa: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(g["backbone"]))
        for kappa, g in grads.items()
    }
    assert norms[0.0] == 0 < norms[1.0]
    jax.tree.map(
        lambda half, full: np.testing.assert_allclose(half, 0.5 * full, rtol=1e-4, atol=1e-6),
        grads[0.5]["backbone"],
        grads[1.0]["backbone"],
    )
    jax.tree.map(np.testing.assert_array_equal, grads[0.0]["expert"], grads[1.0]["expert"])


def test_weight_zero_is_not_computed(setup):
    """λ = 0 must not let a NaN of the expert through, nor a disabled text term one of the decoder's output."""
    data, model, params = setup
    bad = params | {"expert": jax.tree.map(lambda x: x * jnp.nan, params["expert"])}
    value, grad = gradient(model, bad, data, "total", ObjectiveConfig(action_weight=0.0))
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grad))
    # Between the last layer, whose keys and values the expert sees, and the logits.
    backbone = params["backbone"]
    norm = jax.tree.map(lambda x: x * jnp.nan, backbone["llm"]["final_norm"])
    bad = params | {"backbone": backbone | {"llm": backbone["llm"] | {"final_norm": norm}}}
    assert np.isnan(losses(model, bad, data).text)
    value, grad = gradient(model, bad, data, "total", ObjectiveConfig(text=False))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grad))
    got = losses(model, params, data, ObjectiveConfig(text=False))
    assert got.text == 0 and got.total == got.action == value


def test_logits_only_at_targets(setup):
    """A bound on the target tokens that holds them all changes nothing."""
    data, model, params = setup
    longest = int(data.token_loss.sum(1).max())
    np.testing.assert_allclose(
        losses(model, params, data).text, losses(model, params, data, target_tokens=longest).text, rtol=1e-6
    )
    data = with_action_tokens(data, b=4)
    chunk = int(data.action_token_loss.sum(1).max())
    assert chunk < data.action_tokens.shape[1] - 1
    bounds = dict(target_tokens=longest, action_targets=chunk)
    np.testing.assert_allclose(
        losses(model, params, data).text, losses(model, params, data, **bounds).text, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["joint", "tokens"])
def test_no_logits_elsewhere(kind):
    """Of all that loss and gradient compute, what is as wide as the vocabulary has a row per target, and no more."""
    vocab, b, targets, chunk = 1021, 4, 5, 6
    cfg = small.config(kind=kind)
    cfg = dataclasses.replace(
        cfg,
        backbone=dataclasses.replace(cfg.backbone, text=dataclasses.replace(cfg.backbone.text, vocab=vocab)),
    )
    data, model = with_action_tokens(small.batch(cfg, b), b), VLA(cfg)
    if kind == "tokens":
        data = data.replace(actions=None, action_mask=None)
    draws = draw(0, data, ObjectiveConfig())
    params = jax.eval_shape(init_params(model, data), jax.random.key(0))

    def loss(params):
        bounded = of(ObjectiveConfig(), model, target_tokens=targets, action_targets=chunk)
        return bounded.losses(params, data, draws, count(data, ObjectiveConfig(), draws)).total

    made = avals(jax.make_jaxpr(jax.grad(loss))(nn.unbox(params)).jaxpr)
    rows = {a.size // vocab for a in made if a.shape[-1:] == (vocab,) and a.ndim == 3}
    assert rows == {b * targets, b * chunk}


def test_more_draws_are_the_same_loss_on_average(setup):
    """K draws of one pass average what K passes with one draw give."""
    data, model, params = setup
    many = draw(0, data, ObjectiveConfig(noise_draws=4))
    got = losses(model, params, data, ObjectiveConfig(noise_draws=4), draws=many).action
    noisy = many.terms["action"]

    def alone(i):
        one = noisy._replace(**{n: getattr(noisy, n)[:, i : i + 1] for n in ("x_t", "t", "target")})
        return losses(model, params, data, draws=many._replace(terms=many.terms | {"action": one})).action

    singles = [alone(i) for i in range(4)]
    np.testing.assert_allclose(got, np.mean(singles), rtol=1e-5)


def test_empty_modalities_are_zero(setup):
    data, model, params = setup
    none = data.replace(
        token_loss=jnp.zeros_like(data.token_loss), action_mask=jnp.zeros_like(data.action_mask)
    )
    got = losses(model, params, none, counts={"text": jnp.ones(()), "action": jnp.ones(())})
    assert got.total == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_weight": -1.0}, "negative"),
        ({"insulation": 1.5}, "outside"),
        ({"noise_draws": 0}, "at least 1"),
        ({"plan_visible": 2.0}, "probability"),
        ({"action_weight": 0.0, "text": False}, "nothing to learn"),
    ],
)
def test_impossible_values(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ObjectiveConfig(), **change)
