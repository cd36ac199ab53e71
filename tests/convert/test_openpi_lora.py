"""openpi's LoRA checkpoints: merged weights compute what its layers compute, layer by layer, written out."""

import dataclasses
import re

import ml_dtypes
import numpy as np
import pytest

from tests.convert import layouts
from vla_jax.checkpoint import load
from vla_jax.convert import Options, convert

SIZES = dataclasses.replace(layouts.TINY, heads=4)
RANKS = {"": 3, "_1": 5}
"""Of the decoder and of the expert, as openpi's 16 and 32 differ."""


def with_lora(arrays, towers, rng):
    """The arrays with A and B beside every matrix of these towers, in openpi's names and shapes."""
    out = dict(arrays)
    for name, w in arrays.items():
        found = re.search(r"/(q_einsum|kv_einsum|attn_vec_einsum|mlp)(_1)?/(w|gating_einsum|linear)$", name)
        if found is None or (found[2] or "") not in towers:
            continue
        rank = RANKS[found[2] or ""]
        base, join = (name.removesuffix("/w"), "/") if found[3] == "w" else (name, "_")
        out[f"{base}{join}lora_a"] = rng.normal(size=(*w.shape[:-1], rank)).astype(np.float32)
        out[f"{base}{join}lora_b"] = rng.normal(size=(*w.shape[:-2], rank, w.shape[-1])).astype(np.float32)
    return out


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


def converted(tmp_path, arrays, **options):
    layouts.save_openpi(tmp_path / "theirs", arrays, value=True)
    options = Options(horizon=4, **options)
    report = convert(
        tmp_path / "theirs", tmp_path / "out", source="openpi", target="vla_jax", options=options
    )
    return load(tmp_path / "out", "params"), report


def einsum_layer(x, layer, eqn, eqn_a, eqn_b, scale):
    """An attention layer of openpi: its own product, and the product with A and then with B."""
    w, a, b = layer
    return np.einsum(eqn, x, w) + scale * np.einsum(eqn_b, np.einsum(eqn_a, x, a), b)


@pytest.mark.parametrize(("suffix", "ours", "width"), [("", "backbone", 48), ("_1", "expert", 24)])
def test_merged_layers_compute_what_openpis_compute(tmp_path, rng, suffix, ours, width):
    base = layouts.random(layouts.openpi(SIZES, "pi0"))
    arrays = with_lora(base, ("", "_1"), rng)
    scale = 0.5
    params, report = converted(tmp_path, arrays, lora_scale=scale)
    assert report.merged == 10
    tower = params["backbone"]["llm"] if ours == "backbone" else params["expert"]
    attention, mlp = tower["layers"]["attn"], tower["layers"]["mlp"]
    x = rng.normal(size=(2, 7, width)).astype(np.float32)
    heads = rng.normal(size=(2, 7, SIZES.heads, SIZES.head_dim)).astype(np.float32)
    near = {"rtol": 2e-4, "atol": 2e-4}
    root = "PaliGemma/llm/layers"
    for layer in range(SIZES.depth):

        def theirs(name):
            einsum = f"{root}/attn/{name}{suffix}"
            return [arrays[f"{einsum}/{part}"][layer] for part in ("w", "lora_a", "lora_b")]

        wanted = einsum_layer(
            x, theirs("q_einsum"), "btd,ndh->btnh", "btd,ndl->btnl", "btnl,nlh->btnh", scale
        )
        np.testing.assert_allclose(
            np.einsum("btd,ndh->btnh", x, attention["q_einsum"]["w"][layer]), wanted, **near
        )
        wanted = einsum_layer(
            x, theirs("kv_einsum"), "bsd,ckdh->cbskh", "bsd,ckdl->cbskl", "cbskl,cklh->cbskh", scale
        )
        found = np.einsum("bsd,ckdh->cbskh", x, attention["kv_einsum"]["w"][layer])
        np.testing.assert_allclose(found, wanted, **near)
        # The rank's letter replaces the head dim's, so that the product with A is summed over the heads too.
        wanted = einsum_layer(
            heads, theirs("attn_vec_einsum"), "btnh,nhd->btd", "btnh,nhl->btl", "btl,nld->btd", scale
        )
        found = np.einsum("btnh,nhd->btd", heads, attention["attn_vec_einsum"]["w"][layer])
        np.testing.assert_allclose(found, wanted, **near)

        def feed(name, x, *index):
            path = f"{root}/mlp{suffix}/{name}"
            w, a, b = (arrays[path + part][(layer, *index)] for part in ("", "_lora_a", "_lora_b"))
            return x @ w + (x @ a) @ b  # without a scale

        for part in (0, 1):
            wanted = feed("gating_einsum", x, part)
            np.testing.assert_allclose(x @ np.asarray(mlp["gating_einsum"][layer, part]), wanted, **near)
        hidden = rng.normal(size=(2, mlp["linear"].shape[1])).astype(np.float32)
        np.testing.assert_allclose(hidden @ np.asarray(mlp["linear"][layer]), feed("linear", hidden), **near)


def test_a_small_update_of_a_frozen_base_survives(tmp_path, rng):
    """The base is exact in bfloat16 and the update a thousandth of it: rounded once, to float32."""
    base = layouts.random(layouts.openpi(SIZES, "fast"), dtype="bfloat16")
    arrays = with_lora(base, ("",), rng)
    arrays = {k: 0.01 * x if "lora" in k else x for k, x in arrays.items()}
    params, report = converted(tmp_path, arrays)
    assert report.merged == 5
    name = "PaliGemma/llm/layers/mlp/linear"
    exact = arrays[name].astype(np.float64) + np.matmul(
        arrays[f"{name}_lora_a"].astype(np.float64), arrays[f"{name}_lora_b"].astype(np.float64)
    )
    merged = np.asarray(params["backbone"]["llm"]["layers"]["mlp"]["linear"])
    assert merged.dtype == np.float32
    np.testing.assert_allclose(merged, exact, rtol=1e-6, atol=1e-7)
    rounded = exact.astype(ml_dtypes.bfloat16)
    assert np.mean(rounded == arrays[name]) > 0.5  # in bfloat16 most of the update would be gone
    assert params["backbone"]["img"]["head"]["bias"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda arrays, a, b, w: arrays.pop(b), "has no lora_b"),
        (lambda arrays, a, b, w: arrays.pop(w), "the LoRA of .*q_einsum/w"),
        (lambda arrays, a, b, w: arrays.update({b: arrays[b][..., :2, :]}), "LoRA of shapes"),
    ],
)
def test_factors_that_do_not_fit(tmp_path, rng, change, match):
    arrays = with_lora(layouts.random(layouts.openpi(SIZES, "pi0")), ("",), rng)
    layer = "PaliGemma/llm/layers/attn/q_einsum"
    change(arrays, f"{layer}/lora_a", f"{layer}/lora_b", f"{layer}/w")
    with pytest.raises(ValueError, match=match) as caught:
        converted(tmp_path, arrays)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_scale_without_lora_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--lora-scale 2\.0 would do nothing: .* has no LoRA"):
        converted(tmp_path, layouts.random(layouts.openpi(SIZES, "pi0")), lora_scale=2.0)
