"""The kernels give what XLA gives, for values and gradients; a BlockMask says what its dense form says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn_library

from tests.models import small
from vla_jax.layers.attention import attend, attend_across, check_backend, prefix_lm
from vla_jax.models.vla import VLA, portable


def tokens(rng, b, t):
    """Valid tokens with holes and padding, and a causal tail that starts anywhere."""
    valid = rng.random((b, t)) < 0.85
    valid[:, 0] = True
    causal = np.arange(t) >= rng.integers(1, t, (b, 1))
    return jnp.asarray(valid), jnp.asarray(causal)


def arrays(rng, b, t, n, m, e, dtype=jnp.float32):
    shapes = (b, t, n, e), (b, t, m, e), (b, t, m, e)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def test_reach_says_what_the_dense_mask_says():
    rng = np.random.default_rng(0)
    valid, causal = tokens(rng, 5, 17)
    mask = prefix_lm(valid, causal)
    by_reach = (np.arange(17) <= mask.reach()[:, :, None]) & valid[:, None, :] & valid[:, :, None]
    np.testing.assert_array_equal(by_reach, mask.dense())
    start = np.argmax(np.asarray(causal), axis=1)
    for i, first in enumerate(start):  # by hand: bidirectional before `first`, causal from there on
        np.testing.assert_array_equal(mask.reach()[i], [*[first - 1] * first, *range(first, 17)])


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("draws", [0, 1, 2])
def test_splash_equals_xla(kv_heads, draws):
    """Alone, with a past, and with a past that several rows share. Lengths are no multiples of 128."""
    rng = np.random.default_rng(draws)
    b, t, s, n, e = 2, 37, 150, 4, 16
    rows = b * max(draws, 1)
    valid, causal = tokens(rng, rows, t)
    qkv = arrays(rng, rows, t, n, kv_heads, e)
    past = tuple(arrays(rng, b, s, n, kv_heads, e)[1:]) if draws else None
    past_mask = jnp.asarray(rng.random((b, s)) < 0.7) if draws else None
    weight = jnp.asarray(rng.normal(size=(rows, t, n, e))) * valid[..., None, None]  # invalid rows are unread

    def loss(backend, qkv, past):
        out = attend(*qkv, prefix_lm(valid, causal), past, past_mask, backend=backend)
        return jnp.sum(out * weight), out

    outs, gradients = [], []
    for backend in ("xla", "splash"):
        run = jax.jit(jax.value_and_grad(lambda x, b=backend: loss(b, *x), has_aux=True))
        (_, out), gradient = run((qkv, past))
        outs.append(jnp.where(valid[..., None, None], out, 0))
        gradients.append(gradient)
    np.testing.assert_allclose(outs[1], outs[0], atol=2e-6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradients[0])) > 0.1
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, atol=1e-5), *gradients)


@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_cross_attention_of_draws_that_share_their_keys(backend):
    """Against a softmax over the visible keys of each row by itself; where there is none, zero and no gradient."""
    rng = np.random.default_rng(0)
    b, draws, t, s, n, e = 3, 2, 5, 40, 4, 8
    q, k, v = arrays(rng, b * draws, t, n, n, e)[0], *arrays(rng, b, s, n, n, e)[1:]
    visible = jnp.asarray(rng.random((b, s)) < 0.5).at[-1].set(False)

    def across(q, k, v):
        return attend_across(q, k, v, visible, backend=backend)

    found = jax.jit(across)(q, k, v)
    for row in range(b * draws):
        i = row // draws
        keys, values = (np.asarray(x[i])[np.asarray(visible[i])] for x in (k, v))
        weights = jax.nn.softmax(np.einsum("tne,sne->nts", q[row], keys) / np.sqrt(e), axis=-1)
        np.testing.assert_allclose(found[row], np.einsum("nts,sne->tne", weights, values), atol=2e-6)
    gradient = jax.jit(jax.grad(lambda *x: jnp.sum(across(*x) ** 2), argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in gradient)
    assert all((np.asarray(x[-1]) == 0).all() for x in gradient)


def test_a_model_with_splash_predicts_what_it_predicts_with_xla():
    cfg = small.config()
    batch = small.batch(cfg, b=2)
    t = jnp.asarray([0.2, 0.7])
    _, params = small.init(cfg, batch)
    plain, fast = (
        jax.jit(VLA(dataclasses.replace(cfg, attention=attention)).apply)(
            {"params": params}, batch, batch.actions, t
        )
        for attention in ("xla", "splash")
    )
    masks = np.asarray(batch.action_mask), np.asarray(batch.token_mask)[..., None]
    for found, wanted, valid in zip(fast, plain, masks):
        np.testing.assert_allclose(np.where(valid, found, 0), np.where(valid, wanted, 0), atol=5e-5)


def gradient_of_cudnn(draws):
    rng = np.random.default_rng(0)
    b, t, s, n, e = 2, 51, 61, 8, 256  # odd lengths, Gemma's heads
    rows = b * draws
    valid, causal = tokens(rng, rows, t)
    qkv = arrays(rng, rows, t, n, 1, e, jnp.bfloat16)
    past = tuple(arrays(rng, b, s, n, 1, e, jnp.bfloat16)[1:])
    past_mask = jnp.asarray(rng.random((b, s)) < 0.7)

    def loss(backend, x):
        out = attend(*x[0], prefix_lm(valid, causal), x[1], past_mask, backend=backend)
        return jnp.sum(jnp.where(valid[..., None, None], out, 0).astype(jnp.float32) ** 2)

    return loss, (qkv, past)


def test_cudnn_compiles_to_its_forward_and_backward_kernels(monkeypatch):
    """Lowered for CUDA without a GPU; what cuDNN checks of the machine is answered as a Hopper would."""
    monkeypatch.setattr(cudnn_library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn_library, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn_library, "is_cuda_compute_capability_equal", lambda capability: False)
    loss, x = gradient_of_cudnn(draws=2)
    traced = jax.jit(jax.grad(lambda x: loss("cudnn", x))).trace(x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text.replace('"', "(")
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    assert "102x112x" not in text  # no logits [t s] of float32 outside the kernel


@pytest.mark.gpu
@pytest.mark.skipif(
    not any(d.platform == "gpu" for d in jax.devices()), reason="cuDNN attention runs on NVIDIA GPUs only"
)
def test_cudnn_equals_xla():
    loss, x = gradient_of_cudnn(draws=2)
    plain, fast = (jax.jit(jax.value_and_grad(lambda x, b=b: loss(b, x)))(x) for b in ("xla", "cudnn"))
    np.testing.assert_allclose(fast[0], plain[0], rtol=0.02)
    for a, b in zip(jax.tree.leaves(fast[1]), jax.tree.leaves(plain[1])):
        assert (
            float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32)))
            < 0.02
        )


def test_a_kernel_is_refused_in_training_and_replaced_in_serving_where_it_does_not_run():
    with pytest.raises(ValueError, match=r"model.attention=splash runs on tpu, but the devices are cpu"):
        check_backend("splash", "cpu")
    check_backend("splash", "tpu"), check_backend("xla", "cpu"), check_backend("cudnn", "gpu")
    splash = dataclasses.replace(small.config(), attention="splash")
    assert portable(splash, "gpu") == small.config() and portable(splash, "tpu") == splash


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "float32"}, "model.attention=cudnn takes bfloat16"),
        ({"dtype": "bfloat16"}, "vision.width / vision.heads is 12; use model.attention=xla"),
    ],
)
def test_what_cudnn_cannot_do_is_refused_early(values, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small.config(), attention="cudnn", **values)
