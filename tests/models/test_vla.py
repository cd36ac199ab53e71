"""The model against an independent joint implementation, and the properties that masks and caches promise."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import small
from tests.models.joint import joint_forward
from vla_jax.models import presets
from vla_jax.models.generate import generate
from vla_jax.models.vla import VLA
from vla_jax.types import Batch, Given

both_times = pytest.mark.parametrize("setup", ["mlp", "adarms"], indirect=True)

TOLERANCE = dict(rtol=2e-5, atol=2e-5)


@functools.cache
def apply(model):
    """The model's jitted apply."""
    return jax.jit(model.apply, static_argnames="method")


@pytest.fixture(scope="module")
def setup(request):
    """By default the time enters as in π0; `both_times` also runs a test with π0.5's adaptive norms."""
    cfg = small.config(time=getattr(request, "param", "mlp"))
    data = small.batch(cfg)
    model, params = small.init(cfg, data)
    return cfg, data, model, params


@both_times
def test_cached_equals_joint(setup):
    cfg, data, model, params = setup
    x_t = jax.random.normal(jax.random.key(3), data.actions.shape)
    t = jnp.array([0.1, 0.5, 0.9])
    velocity, logits = apply(model)({"params": params}, data, x_t, t)
    want_velocity, want_logits = jax.jit(lambda params: joint_forward(cfg, params, data, x_t, t))(params)
    valid = np.asarray(data.action_mask)
    np.testing.assert_allclose(np.where(valid, velocity, 0), np.where(valid, want_velocity, 0), **TOLERANCE)
    mask = np.asarray(data.token_mask)
    np.testing.assert_allclose(logits[mask], want_logits[mask], **TOLERANCE)
    assert np.abs(velocity).max() > 0.1


def velocities(model, params, data, x_t, t):
    cache, _ = apply(model)({"params": params}, data, method="prefill")
    v = apply(model)({"params": params}, cache, Given.of(data), x_t, t, method="denoise")
    return np.where(data.action_mask, v, 0)


def test_padded_dims_hold_what_the_expert_says(setup):
    """Zeros or noise in the dims that a robot lacks; steps behind the episode's end are never read."""
    cfg, data, _, params = setup
    data = data.replace(action_mask=data.action_mask.at[..., 2].set(False))
    assert not data.action_mask.any(axis=-1).all()
    x_t, t = jax.random.normal(jax.random.key(3), data.actions.shape), jnp.array([0.1, 0.5, 0.9])
    steps = data.action_mask.any(axis=-1, keepdims=True)
    for padding, heard in (("zero", False), ("noise", True)):
        cfg = small.replace_expert(cfg, padding=padding)
        v = velocities(VLA(cfg), params, data, x_t, t)
        want, _ = joint_forward(cfg, params, data, x_t, t)
        np.testing.assert_allclose(v, np.where(data.action_mask, want, 0), **TOLERANCE)
        dims, behind = x_t.at[..., 2].add(1.0), jnp.where(steps, x_t, 1e3)
        np.testing.assert_array_equal(velocities(VLA(cfg), params, data, behind, t), v)
        moved = np.abs(velocities(VLA(cfg), params, data, dims, t) - v).max()
        assert (moved > 1e-3) == heard and (heard or moved == 0)


@both_times
def test_what_is_masked_changes_nothing(setup):
    """Pixels of absent cameras, padding tokens, padded steps and dims."""
    _, data, model, params = setup
    x_t = jax.random.normal(jax.random.key(3), data.actions.shape)
    t = jnp.full((3,), 0.3)
    noisy = data.replace(
        images=data.images | {"wrist": data.images["wrist"].at[-1].set(77)},
        tokens=jnp.where(data.token_mask, data.tokens, 9),
    )
    other = jnp.where(data.action_mask, x_t, 1e3)
    np.testing.assert_array_equal(
        velocities(model, params, data, x_t, t), velocities(model, params, noisy, other, t)
    )
    logits = apply(model)({"params": params}, data, x_t, t)[1]
    changed = apply(model)({"params": params}, noisy, other, t)[1]
    np.testing.assert_array_equal(logits[data.token_mask], changed[data.token_mask])


def test_padding_and_absent_cameras_can_be_dropped(setup):
    cfg, data, model, params = setup
    x_t, t = data.actions, jnp.full((3,), 0.3)
    row = jax.tree.map(lambda x: x[-1:], data)  # the sample without a wrist camera
    length = int(row.token_mask.sum())
    short = row.replace(
        **{
            name: getattr(row, name)[:, :length]
            for name in ("tokens", "token_mask", "token_causal", "token_loss")
        }
    )
    steps = int(row.action_mask[0, :, 0].sum())
    got = apply(VLA(dataclasses.replace(cfg, cameras=("top",))))(
        {"params": params}, short.replace(action_mask=None), x_t[-1:, :steps], t[-1:]
    )[0]
    want = velocities(model, params, data, x_t, t)[-1:, :steps]
    np.testing.assert_allclose(got, want, **TOLERANCE)


def test_samples_are_independent(setup):
    _, data, model, params = setup
    x_t, t = data.actions, jnp.array([0.1, 0.5, 0.9])
    order = jnp.array([2, 0, 1])
    want = velocities(model, params, data, x_t, t)[order]
    got = velocities(model, params, jax.tree.map(lambda x: x[order], data), x_t[order], t[order])
    np.testing.assert_allclose(got, want, **TOLERANCE)


def test_draws_share_one_cache(setup):
    """K suffixes of one cache are K separate passes."""
    _, data, model, params = setup
    draws = 4
    x_t = jax.random.normal(jax.random.key(5), (3, draws, *data.actions.shape[1:]))
    t = jax.random.uniform(jax.random.key(6), (3, draws))
    cache, _ = apply(model)({"params": params}, data, method="prefill")

    def rows(x):
        return x.reshape(-1, *x.shape[2:])

    got = apply(model)(
        {"params": params},
        cache,
        Given.of(data).repeat(draws),
        rows(x_t),
        rows(t),
        method="denoise",
    ).reshape(x_t.shape)
    for i in range(draws):
        want = velocities(model, params, data, x_t[:, i], t[:, i])
        np.testing.assert_allclose(np.where(data.action_mask, got[:, i], 0), want, **TOLERANCE)


@both_times
def test_time_per_token(setup):
    """The same time for all tokens is the scalar time; one token's own time changes the result."""
    _, data, model, params = setup
    x_t, t = data.actions, jnp.array([0.1, 0.5, 0.9])
    per_token = jnp.broadcast_to(t[:, None], x_t.shape[:2])
    want = velocities(model, params, data, x_t, t)
    np.testing.assert_array_equal(velocities(model, params, data, x_t, per_token), want)
    assert np.abs(velocities(model, params, data, x_t, per_token.at[:, 0].set(1.0)) - want).max() > 1e-3


def test_target_is_seen_only_when_visible(setup):
    _, data, model, params = setup
    x_t, t = data.actions, jnp.full((3,), 0.3)

    def run(batch, visible):
        cache, _ = apply(model)({"params": params}, batch, visible, method="prefill")
        v = apply(model)({"params": params}, cache, Given.of(batch), x_t, t, method="denoise")
        return np.where(data.action_mask, v, 0)

    blind, seeing = run(data, jnp.zeros(3, bool)), run(data, jnp.ones(3, bool))
    np.testing.assert_allclose(run(small.without_target(data), jnp.ones(3, bool)), blind, **TOLERANCE)
    assert np.abs(seeing - blind).max() > 1e-2
    mixed = run(data, jnp.array([True, False, True]))
    np.testing.assert_allclose(
        mixed, np.where(np.array([1, 0, 1])[:, None, None], seeing, blind), **TOLERANCE
    )


def test_greedy_text_is_what_teacher_forcing_predicts(setup):
    _, data, model, params = setup
    made = generate(model, params, data, jax.random.split(jax.random.key(0), 3), max_tokens=6, eos=small.EOS)
    # Put what was decoded behind the prompt: each token must be the argmax at the place before it.
    prompt = np.asarray((data.token_mask & ~data.token_causal).sum(1))
    for row in range(3):
        text = np.asarray(made.tokens[row])[np.asarray(made.mask[row])]
        one = jax.tree.map(lambda x: x[row : row + 1], small.without_target(data))
        n, m = prompt[row], len(text)
        tokens = jnp.concatenate([one.tokens[:, :n], jnp.asarray(text)[None]], axis=1)
        causal = jnp.arange(n + m)[None] >= n
        forced = one.replace(
            tokens=tokens, token_mask=jnp.ones_like(causal), token_causal=causal, token_loss=causal
        )
        _, hidden = apply(model)({"params": params}, forced, method="prefill")
        logits = apply(model)({"params": params}, hidden, method="logits")
        np.testing.assert_array_equal(np.argmax(logits[0, n - 1 : -1], -1), text)


def test_decoded_text_is_seen_as_the_forced_one(setup):
    """Acting on the cache that decoding left equals reading the same text as a target."""
    _, data, model, params = setup
    made = generate(model, params, data, jax.random.split(jax.random.key(0), 3), max_tokens=5, eos=small.EOS)
    x_t, t = data.actions, jnp.full((3,), 0.3)
    args = (Given.of(data), x_t, t)
    got = apply(model)({"params": params}, made.context, *args, method="denoise")
    prompt = np.asarray((data.token_mask & ~data.token_causal).sum(1))
    for row in range(3):
        text = np.asarray(made.tokens[row])[np.asarray(made.mask[row])]
        n, m = prompt[row], len(text)
        one = jax.tree.map(lambda x: x[row : row + 1], data)
        causal = jnp.arange(n + m)[None] >= n
        forced = one.replace(
            tokens=jnp.concatenate([one.tokens[:, :n], jnp.asarray(text)[None]], axis=1),
            token_mask=jnp.ones_like(causal),
            token_causal=causal,
            token_loss=causal,
        )
        cache, _ = apply(model)({"params": params}, forced, jnp.ones(1, bool), method="prefill")
        want = apply(model)(
            {"params": params}, cache, *jax.tree.map(lambda x: x[row : row + 1], args), method="denoise"
        )
        mask = np.asarray(data.action_mask[row])
        np.testing.assert_allclose(got[row][mask], want[0][mask], **TOLERANCE)


def test_scan_unroll_and_remat_are_the_same_function(setup):
    cfg, data, model, params = setup
    x_t, t = data.actions, jnp.full((3,), 0.3)

    def loss(model, params):
        return jnp.sum(model.apply({"params": params}, data, x_t, t)[0] ** 2)

    want = jax.grad(loss, 1)(model, params)
    for change in (
        {"unroll": 2},
        {"remat": "nothing_saveable"},
        {"remat": "dots_with_no_batch_dims_saveable"},
    ):
        got = jax.grad(loss, 1)(VLA(dataclasses.replace(cfg, **change)), params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize(("preset", "parameters"), [("pi0", 3_238_048_528), ("pi05", 3_353_433_872)])
def test_full_size_parameter_counts(preset, parameters):
    """The published models have exactly as many (nothing is allocated here)."""
    cfg = getattr(presets, preset)()
    shape = jax.ShapeDtypeStruct
    size, e = cfg.backbone.vision.image_size, cfg.expert
    text = shape((1, 8), bool)
    data = Batch(
        images={n: shape((1, size, size, 3), jnp.uint8) for n in cfg.cameras},
        image_mask={n: shape((1,), bool) for n in cfg.cameras},
        state=shape((1, e.state_dim), jnp.float32),
        tokens=shape((1, 8), jnp.int32),
        token_mask=text,
        token_causal=text,
        token_loss=text,
    )
    chunk = shape((1, e.horizon, e.action_dim), jnp.float32)
    made = jax.eval_shape(VLA(cfg).init, jax.random.key(0), data, chunk, shape((1,), jnp.float32))
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(nn.unbox(made))) == parameters


def test_unresolved_sizes_are_refused():
    cfg = small.replace_expert(small.config(), action_dim=0)
    data = small.batch(small.config())
    with pytest.raises(ValueError, match=r"expert\.action_dim is not set"):
        VLA(cfg).init(jax.random.key(0), data, data.actions, jnp.zeros(3))
