"""The dit expert and the encoder backbone: against an independent form, and the contract's promises for both."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import small
from vla_jax.models.backbones.encoder import EncoderConfig
from vla_jax.models.experts.dit import DitConfig
from vla_jax.models.generate import generate
from vla_jax.models.stack import unstacked
from vla_jax.models.vla import VLA
from vla_jax.types import Given

DIT = DitConfig(width=24, depth=4, heads=3, mlp=40, horizon=5, action_dim=3, state_dim=4)
TOLERANCE = dict(rtol=2e-5, atol=2e-5)


def config(**changes):
    """PaliGemma's features, or an encoder's, read by a dit."""
    return dataclasses.replace(small.config(), expert=DIT, **changes)


def encoder(**changes) -> EncoderConfig:
    return EncoderConfig(vision=small.config().backbone.vision, width=20, **changes)


@functools.cache
def apply(model):
    return jax.jit(model.apply, static_argnames="method")


@pytest.fixture(scope="module", params=["paligemma", "encoder"])
def setup(request):
    cfg = config() if request.param == "paligemma" else config(backbone=encoder(state_token=True))
    data = small.batch(cfg)
    model, params = small.init(cfg, data)
    x_t = jax.random.normal(jax.random.key(3), data.actions.shape)
    return cfg, data, model, params, x_t, jnp.array([0.1, 0.5, 0.9])


def denoise(setup, x_t=None, t=None, params=None, data=None):
    _, own, model, weights, *noisy = setup
    data, variables = data or own, {"params": params or weights}
    x_t, t = noisy[0] if x_t is None else x_t, noisy[1] if t is None else t
    context, _ = apply(model)(variables, data, method="prefill")
    return apply(model)(variables, context, Given.of(data), x_t, t, method="denoise")


def reference(p, features, visible, data, x_t, t):
    """The expert once more, in float64 and sample by sample, from its description."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
    steps = np.asarray(data.action_mask.any(-1))

    def dense(name, x, tree=p):
        return x @ tree[name]["kernel"] + tree[name]["bias"]

    def norm(x, eps=1e-5):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)

    def silu(x):
        return x / (1 + np.exp(-x))

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def waves(t, width, last):
        frequency = 1e4 ** -(np.arange(width // 2) / last)
        return np.concatenate([np.sin(1000 * t * frequency), np.cos(1000 * t * frequency)])

    def modulated(x, w, told, eps=1e-5):
        scale, shift = np.split(dense("Dense_0", told, w), 2)
        return norm(x, eps) * (1 + scale) + shift

    def block(x, w, told, source, sees):
        normed = modulated(x, w["norm"], told)
        source = normed if source is None else source
        q, k, v = (
            np.einsum("td,dne->tne", y, w[name]["kernel"]) + w[name]["bias"]
            for name, y in (("query", normed), ("key", source), ("value", source))
        )
        logits = np.where(sees, np.einsum("tne,sne->nts", q, k) / np.sqrt(q.shape[-1]), -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = np.einsum("nts,sne->tne", weights / weights.sum(-1, keepdims=True), v)
        x = x + np.einsum("tne,ned->td", out, w["out"]["kernel"]) + w["out"]["bias"]
        return x + dense("Dense_1", gelu(dense("Dense_0", norm(x), w["mlp"])), w["mlp"])

    result = []
    for b in range(len(t)):
        valid = np.concatenate([[True], steps[b]])
        chunk = np.where(np.asarray(data.action_mask[b]), x_t[b], 0)
        times = np.broadcast_to(waves(t[b], DIT.width, DIT.width // 2), (DIT.horizon, DIT.width))
        actions = dense("action_time", np.concatenate([dense("action_in", chunk), times], -1))
        actions = dense("action_mix", silu(actions)) + p["action_positions"]
        state = dense("state_out", np.maximum(dense("state_in", np.asarray(data.state[b], np.float64)), 0))
        x = np.concatenate([state[None], actions])
        told = silu(dense("time_out", silu(dense("time_in", waves(t[b], 256, 127)))))
        read = norm(np.asarray(features[b], np.float64)) * p["features_norm"]["scale"]
        read = dense("features_proj", read + p["features_norm"]["bias"])
        for layer in range(DIT.depth // 2):
            w = jax.tree.map(lambda a: a[layer], p["layers"])
            x = block(x, w["cross"], told, read, np.asarray(visible[b])[None, None])
            x = block(x, w["own"], told, None, valid[None, None])
        x = dense("out_proj", modulated(x, p["final_norm"], told, 1e-6)[1:])
        result.append(dense("action_out", np.maximum(dense("action_mid", x), 0)))
    return np.array(result)


def test_it_computes_what_its_description_says(setup):
    _, data, model, params, x_t, t = setup
    context, _ = apply(model)({"params": params}, data, method="prefill")
    want = reference(
        params["expert"], context.features, context.visible, data, np.asarray(x_t), np.asarray(t)
    )
    got, mask = denoise(setup), np.asarray(data.action_mask)
    np.testing.assert_allclose(np.where(mask, got, 0), np.where(mask, want, 0), **TOLERANCE)
    assert np.abs(want).max() > 0.1


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("per_step", [False, True])
def test_what_is_prepared_gives_the_same(setup, apart, per_step):
    """Prepared once, conditioned once, stacked or with its layers apart, K draws per context."""
    _, data, model, params, x_t, t = setup
    if per_step:
        t = jnp.broadcast_to(t[:, None], x_t.shape[:2]).at[:, 0].set(1.0)
    want = denoise(setup, t=t)
    variables = {"params": unstacked(params) if apart else params}
    run = apply(model)
    context, _ = run(variables, data, method="prefill")
    context, given = run(variables, context, Given.of(data), method="prepare")
    assert context.features is None
    at = run(variables, jnp.repeat(t, 2, axis=0), method="condition")
    got = run(variables, context, given.repeat(2), jnp.repeat(x_t, 2, axis=0), at, method="denoise")
    np.testing.assert_allclose(got, jnp.repeat(want, 2, axis=0), rtol=1e-6, atol=1e-6)
    later = run(variables, jnp.full_like(t, 0.77), method="condition")
    assert np.abs(run(variables, context, given, x_t, later, method="denoise") - want).max() > 1e-3


def test_time_per_step(setup):
    """The same time for all steps is the chunk's; one step's own time changes the result."""
    _, _, _, _, x_t, t = setup
    per_step = jnp.broadcast_to(t[:, None], x_t.shape[:2])
    want = denoise(setup)
    np.testing.assert_allclose(denoise(setup, t=per_step), want, rtol=1e-6, atol=1e-6)
    assert np.abs(denoise(setup, t=per_step.at[:, 0].set(1.0)) - want).max() > 1e-3


def test_what_is_masked_changes_nothing(setup):
    """Pixels of absent cameras, padding tokens, padded steps and dims."""
    _, data, _, _, x_t, _ = setup
    noisy = data.replace(
        images=data.images | {"wrist": data.images["wrist"].at[-1].set(77)},
        tokens=jnp.where(data.token_mask, data.tokens, 9),
    )
    mask = np.asarray(data.action_mask)
    other = jnp.where(data.action_mask, x_t, 1e3)
    want, got = denoise(setup), denoise(setup, x_t=other, data=noisy)
    np.testing.assert_array_equal(np.where(mask, got, 0), np.where(mask, want, 0))
    seen = denoise(setup, data=data.replace(images=data.images | {"top": data.images["top"].at[:].set(77)}))
    assert np.abs(np.where(mask, seen - want, 0)).max() > 1e-3
    moved = denoise(setup, data=data.replace(state=data.state + 1))
    assert np.abs(np.where(mask, moved - want, 0)).max() > 1e-3


def test_an_absent_camera_can_be_dropped(setup):
    """The same parameters with fewer cameras, whatever their order."""
    cfg, data, _, params, x_t, t = setup
    row = jax.tree.map(lambda x: x[-1:], data)
    for cameras in (("top",), ("wrist", "top")):
        model = VLA(dataclasses.replace(cfg, cameras=cameras))
        got, _ = apply(model)({"params": params}, row, x_t[-1:], t[-1:])
        np.testing.assert_allclose(
            np.where(row.action_mask, got, 0), np.where(row.action_mask, denoise(setup)[-1:], 0), **TOLERANCE
        )


@pytest.mark.parametrize(
    "change", [{"unroll": 2}, {"remat": "nothing_saveable"}, {"remat": "save_attention"}]
)
def test_unroll_and_remat_are_the_same_function(setup, change):
    cfg, data, model, params, x_t, t = setup

    def loss(model, params):
        return jnp.sum(model.apply({"params": params}, data, x_t, t)[0] ** 2)

    gradient = jax.jit(jax.grad(loss, 1), static_argnums=0)
    want, got = gradient(model, params), gradient(VLA(dataclasses.replace(cfg, **change)), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(want["expert"]))


def test_decoded_text_is_seen_as_the_forced_one():
    """A dit beside a language model reads the features of a plan that was decoded."""
    cfg = config()
    data = small.batch(cfg)
    model, params = small.init(cfg, data)
    made = generate(model, params, data, jax.random.split(jax.random.key(0), 3), max_tokens=4, eos=small.EOS)
    x_t, t = data.actions, jnp.full((3,), 0.3)
    got = apply(model)({"params": params}, made.context, Given.of(data), x_t, t, method="denoise")
    prompt = np.asarray((data.token_mask & ~data.token_causal).sum(1))
    for row in range(3):
        text = np.asarray(made.tokens[row])[np.asarray(made.mask[row])]
        n, m = prompt[row], len(text)
        one = jax.tree.map(lambda x: x[row : row + 1], data)
        causal = jnp.arange(n + m)[None] >= n
        forced = one.replace(
            tokens=jnp.concatenate([one.tokens[:, :n], jnp.asarray(text)[None]], axis=1),
            token_mask=jnp.ones_like(causal), token_causal=causal, token_loss=causal,
        )  # fmt: skip
        context, _ = apply(model)({"params": params}, forced, jnp.ones(1, bool), method="prefill")
        want = model.apply(
            {"params": params}, context, Given.of(one), x_t[row : row + 1], t[:1], method="denoise"
        )
        mask = np.asarray(data.action_mask[row])
        np.testing.assert_allclose(got[row][mask], want[0][mask], **TOLERANCE)
