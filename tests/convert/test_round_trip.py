"""Every format at tiny size, in its exact layout: in, out again, and bit for bit the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.convert import layouts
from tests.convert.layouts import TINY
from vla_jax.checkpoint import load, read_meta
from vla_jax.convert import Options, convert
from vla_jax.convert.convert import open_weights
from vla_jax.convert.sources import OrbaxSource, SafetensorsSource
from vla_jax.convert.time_flip import reflect

STATISTICS = {
    name: {kind: [0.1 * i + len(kind) for i in range(n)] for kind in ("mean", "std", "q01", "q99")}
    for name, n in (("state", 6), ("actions", 5))
}


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name].view(np.uint8), array.view(np.uint8), err_msg=name)


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def everything(source):
    return {name: source.read(name) for name in source.specs}


def paligemma_config(rows, vocab):
    return {
        "model_type": "paligemma",
        "image_token_index": vocab,
        "vision_config": {"num_attention_heads": TINY.vision_heads},
        "text_config": {"num_attention_heads": TINY.heads, "vocab_size": rows},
    }


@pytest.mark.parametrize("prefix", ["params/", ""])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_big_vision(tmp_path, prefix, save):
    arrays = layouts.random(layouts.big_vision(TINY))
    save(tmp_path / "pt.npz", **{prefix + name: array for name, array in arrays.items()})
    report = convert(tmp_path / "pt.npz", tmp_path / "ours", source="big_vision", target="vla_jax")
    assert report.parameters == sum(array.size for array in arrays.values())
    assert_same(flat(load(tmp_path / "ours", "params")), {f"backbone/{n}": a for n, a in arrays.items()})


@pytest.mark.parametrize("names", [*layouts.PALIGEMMA])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_paligemma_hf(tmp_path, names, dtype):
    arrays = layouts.random(layouts.paligemma_hf(TINY, names, 64), dtype)
    table = f"{layouts.PALIGEMMA[names][2]}.embed_tokens.weight"
    arrays[table][TINY.vocab :] = 0  # the rows that are cut off and filled up again
    layouts.save_safetensors(tmp_path / "theirs", arrays)
    (tmp_path / "theirs/config.json").write_text(json.dumps(paligemma_config(64, TINY.vocab)))
    convert(tmp_path / "theirs", tmp_path / "ours", source="paligemma_hf", target="vla_jax")
    assert load(tmp_path / "ours", "params")["backbone"]["llm"]["embedder"]["input_embedding"].shape[0] == 63
    written = names if names != "5.23 saved" else "legacy"
    options = Options(names=written, max_file_bytes=30_000)
    convert(tmp_path / "ours", tmp_path / "out", source="vla_jax", target="paligemma_hf", options=options)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    found = everything(SafetensorsSource(tmp_path / "out"))
    if written == names:
        assert_same(found, arrays)
    convert(tmp_path / "out", tmp_path / "again", source="paligemma_hf", target="vla_jax")
    assert_same(flat(load(tmp_path / "again", "params")), flat(load(tmp_path / "ours", "params")))


def test_a_copy_of_the_tied_table_is_compared(tmp_path):
    arrays = layouts.random(layouts.paligemma_hf(TINY, "4.5x", 64))
    arrays["lm_head.weight"] = arrays["model.language_model.embed_tokens.weight"].copy()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text(json.dumps(paligemma_config(64, TINY.vocab)))
    layouts.save_safetensors(tmp_path / "theirs", arrays)
    report = convert(tmp_path / "theirs", tmp_path / "ours", source="paligemma_hf", target="vla_jax")
    assert report.left_out == ("lm_head.weight",)
    arrays["lm_head.weight"][1, 2] += 1
    layouts.save_safetensors(tmp_path / "theirs", arrays)
    with pytest.raises(ValueError, match=r"lm_head.weight is tied to .*embed_tokens.weight, but differs"):
        convert(tmp_path / "theirs", tmp_path / "other", source="paligemma_hf", target="vla_jax")
    assert not (tmp_path / "other").exists()


def pi0_hf_files(folder, dtype="float32"):
    shapes = layouts.torch_pi0(TINY, "pi0", "", "vision_tower", "language_model.model")
    table = "paligemma_with_expert.paligemma.model.language_model.model.embed_tokens.weight"
    arrays = layouts.random(shapes | {table: (TINY.vocab, TINY.width)}, dtype)
    arrays["paligemma_with_expert.gemma_expert.lm_head.weight"][:] = 0  # nothing reads it; we write zeros
    layouts.save_safetensors(folder, arrays)
    vlm = paligemma_config(TINY.vocab, TINY.vocab)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "pi0", "chunk_size": 7, "vlm_config": vlm, "dit_config": {}})
    )
    return arrays


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pi0_hf(tmp_path, dtype):
    arrays = pi0_hf_files(tmp_path / "theirs", dtype)
    report = convert(tmp_path / "theirs", tmp_path / "ours", source="pi0_hf", target="vla_jax")
    assert report.model.expert.horizon == 7
    convert(tmp_path / "ours", tmp_path / "out", source="vla_jax", target="pi0_hf")
    assert_same(everything(SafetensorsSource(tmp_path / "out")), arrays)


def save_statistics(folder):
    file = folder / "assets/lab/robot/norm_stats.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"norm_stats": STATISTICS}))


@pytest.mark.parametrize("kind", ["pi0", "pi05", "fast"])
@pytest.mark.parametrize("value", [True, False])
def test_openpi(tmp_path, kind, value):
    arrays = layouts.random(layouts.openpi(TINY, kind))
    layouts.save_openpi(tmp_path / "theirs", arrays, value=value)
    save_statistics(tmp_path / "theirs")
    options = Options(horizon=9, value=value)
    convert(tmp_path / "theirs", tmp_path / "ours", source="openpi", target="vla_jax", options=options)
    assert read_meta(tmp_path / "ours")["assets"]["norm_stats"] == {"lab/robot": STATISTICS}
    convert(tmp_path / "ours", tmp_path / "out", source="vla_jax", target="openpi", options=options)
    behind = "/value" if value else ""
    wanted = {f"params/{name}{behind}": array for name, array in arrays.items()}
    assert_same(everything(OrbaxSource(tmp_path / "out/params")), wanted)
    stats = (tmp_path / "out/assets/lab/robot/norm_stats.json").read_text()
    assert json.loads(stats) == {"norm_stats": STATISTICS}


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_two_roads_lead_to_one_model(tmp_path, kind):
    """openpi's arrays, rearranged by hand into LeRobot's layout: both imports give the same parameters."""
    arrays = layouts.random(layouts.openpi(TINY, kind))
    layouts.save_openpi(tmp_path / "openpi", arrays, value=True)
    lerobot = by_hand(arrays, kind)
    assert {n: a.shape for n, a in lerobot.items()} == layouts.lerobot(TINY, kind)
    save_lerobot(tmp_path / "lerobot", lerobot, kind)
    ours = {}
    for source in ("openpi", "lerobot"):
        convert(tmp_path / source, tmp_path / f"from_{source}", source=source, target="vla_jax")
        ours[source] = flat(load(tmp_path / f"from_{source}", "params"))
    assert_same(ours["lerobot"], ours["openpi"])
    meta = read_meta(tmp_path / "from_lerobot")
    assert meta["assets"]["lerobot"]["statistics"]["action"]["mean"] == [1.0, 2.0, 3.0]
    assert meta["config"]["model"]["cameras"] == ["top", "left"]
    assert meta["config"]["model"]["expert"]["horizon"] == 11


def by_hand(arrays, kind):
    """The rearrangements written out once more, with loops."""
    s, out = TINY, {}
    get = lambda name: np.ascontiguousarray(arrays[name])  # noqa: E731
    both, img = "model.paligemma_with_expert", "PaliGemma/img"
    base = f"{both}.paligemma.model"
    vision = f"{base}.vision_tower.vision_model"
    out[f"{vision}.embeddings.patch_embedding.weight"] = get(f"{img}/embedding/kernel").transpose(3, 2, 0, 1)
    out[f"{vision}.embeddings.patch_embedding.bias"] = get(f"{img}/embedding/bias")
    out[f"{vision}.embeddings.position_embedding.weight"] = get(f"{img}/pos_embedding")[0]
    out[f"{base}.multi_modal_projector.linear.weight"] = get(f"{img}/head/kernel").T
    out[f"{base}.multi_modal_projector.linear.bias"] = get(f"{img}/head/bias")
    for theirs, part in (("weight", "scale"), ("bias", "bias")):
        out[f"{vision}.post_layernorm.{theirs}"] = get(f"{img}/Transformer/encoder_norm/{part}")
    block, d = f"{img}/Transformer/encoderblock", s.vision
    for i in range(s.vision_depth):
        layer = f"{vision}.encoder.layers.{i}"
        for j in (0, 1):
            for theirs, part in (("weight", "scale"), ("bias", "bias")):
                out[f"{layer}.layer_norm{j + 1}.{theirs}"] = get(f"{block}/LayerNorm_{j}/{part}")[i]
            out[f"{layer}.mlp.fc{j + 1}.weight"] = get(f"{block}/MlpBlock_0/Dense_{j}/kernel")[i].T
            out[f"{layer}.mlp.fc{j + 1}.bias"] = get(f"{block}/MlpBlock_0/Dense_{j}/bias")[i]
        for theirs, name in (
            ("q_proj", "query"),
            ("k_proj", "key"),
            ("v_proj", "value"),
            ("out_proj", "out"),
        ):
            kernel = get(f"{block}/MultiHeadDotProductAttention_0/{name}/kernel")[i]
            bias = get(f"{block}/MultiHeadDotProductAttention_0/{name}/bias")[i]
            out[f"{layer}.self_attn.{theirs}.weight"] = kernel.reshape(d, d).T
            out[f"{layer}.self_attn.{theirs}.bias"] = bias.reshape(d)
    for prefix, suffix in ((f"{base}.language_model", ""), (f"{both}.gemma_expert.model", "_1")):
        adaptive = suffix and kind == "pi05"
        norm_names = {f"{prefix}.norm": (f"PaliGemma/llm/final_norm{suffix}", ...)}
        for i in range(s.depth):
            layer, ours = f"{prefix}.layers.{i}", "PaliGemma/llm/layers"
            q = get(f"{ours}/attn/q_einsum{suffix}/w")[i]
            kv = get(f"{ours}/attn/kv_einsum{suffix}/w")[i]
            o = get(f"{ours}/attn/attn_vec_einsum{suffix}/w")[i]
            out[f"{layer}.self_attn.q_proj.weight"] = np.concatenate([q[n].T for n in range(s.heads)])
            out[f"{layer}.self_attn.k_proj.weight"] = np.concatenate([kv[0, m].T for m in range(s.kv)])
            out[f"{layer}.self_attn.v_proj.weight"] = np.concatenate([kv[1, m].T for m in range(s.kv)])
            out[f"{layer}.self_attn.o_proj.weight"] = np.concatenate([o[n].T for n in range(s.heads)], axis=1)
            gate, up = get(f"{ours}/mlp{suffix}/gating_einsum")[i]
            out[f"{layer}.mlp.gate_proj.weight"], out[f"{layer}.mlp.up_proj.weight"] = gate.T, up.T
            out[f"{layer}.mlp.down_proj.weight"] = get(f"{ours}/mlp{suffix}/linear")[i].T
            norm_names[f"{layer}.input_layernorm"] = (f"{ours}/pre_attention_norm{suffix}", i)
            norm_names[f"{layer}.post_attention_layernorm"] = (f"{ours}/pre_ffw_norm{suffix}", i)
        for theirs, (name, i) in norm_names.items():
            if adaptive:
                out[f"{theirs}.dense.weight"] = get(f"{name}/Dense_0/kernel")[i].T
                out[f"{theirs}.dense.bias"] = get(f"{name}/Dense_0/bias")[i]
            else:
                out[f"{theirs}.weight"] = get(f"{name}/scale")[i]
    for name in layouts.heads(s, kind):
        out[f"model.{name}.weight"] = get(f"{name}/kernel").T
        out[f"model.{name}.bias"] = get(f"{name}/bias")
    out[f"{both}.paligemma.lm_head.weight"] = get("PaliGemma/llm/embedder/input_embedding")
    out[f"{both}.gemma_expert.lm_head.weight"] = np.zeros((s.vocab, s.expert), np.float32)
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def save_lerobot(folder, arrays, kind):
    from safetensors.numpy import save_file

    layouts.save_safetensors(folder, arrays)
    features = {
        "observation.images.top": {"type": "VISUAL", "shape": [3, 8, 8]},
        "observation.images.left": {"type": "VISUAL", "shape": [3, 8, 8]},
        "observation.state": {"type": "STATE", "shape": [6]},
    }
    config = {"type": kind, "paligemma_variant": "gemma_2b", "chunk_size": 11, "input_features": features}
    (folder / "config.json").write_text(json.dumps(config))
    state = "policy_preprocessor_step_5_normalizer_processor.safetensors"
    steps = [
        {"registry_name": "to_batch_processor"},
        {"registry_name": "normalizer_processor", "state_file": state},
    ]
    (folder / "policy_preprocessor.json").write_text(
        json.dumps({"name": "policy_preprocessor", "steps": steps})
    )
    save_file({"action.mean": np.asarray([1, 2, 3], np.float32)}, folder / state)


def test_bfloat16_is_float32_rounded(tmp_path):
    arrays = layouts.random(layouts.big_vision(TINY))
    np.savez(tmp_path / "pt.npz", **arrays)
    args = dict(source="big_vision", target="vla_jax", dtype="bfloat16")
    convert(tmp_path / "pt.npz", tmp_path / "ours", **args)
    wanted = {f"backbone/{n}": a.astype(jax.numpy.bfloat16) for n, a in arrays.items()}
    assert_same(flat(load(tmp_path / "ours", "params")), wanted)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_ours_to_theirs_to_ours_after_training(tmp_path, kind):
    """Weights that were changed here come back bit for bit the same, those that read the time too."""
    from vla_jax.checkpoint import Checkpoints

    layouts.save_openpi(tmp_path / "theirs", layouts.random(layouts.openpi(TINY, kind)), value=False)
    convert(tmp_path / "theirs", tmp_path / "ours", source="openpi", target="vla_jax")
    params = jax.tree.map(lambda x: x * 1.1 + 0.01, load(tmp_path / "ours", "params"))
    checkpoints = Checkpoints(tmp_path / "trained", keep=1)
    checkpoints.save(1, {"params": params}, {"config": read_meta(tmp_path / "ours")["config"]})
    checkpoints.close()
    convert(tmp_path / "trained", tmp_path / "out", source="vla_jax", target="openpi")
    convert(tmp_path / "out", tmp_path / "again", source="openpi", target="vla_jax")
    assert_same(flat(load(tmp_path / "again", "params")), flat(params))
    assert read_meta(tmp_path / "again")["config"] == read_meta(tmp_path / "ours")["config"]


def test_reflection_is_its_own_inverse_and_turns_the_clock():
    from vla_jax.models.experts.time import embed_time

    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(40, 6))
    np.testing.assert_allclose(reflect(reflect(kernel, width=24), width=24), kernel, atol=1e-14)
    np.testing.assert_array_equal(reflect(kernel, width=24)[:16], kernel[:16])
    t = rng.uniform(size=50).astype(np.float32)
    theirs = np.asarray(embed_time(1 - t, 24), np.float64) @ kernel[16:]
    ours = np.asarray(embed_time(t, 24), np.float64) @ reflect(kernel, width=24)[16:]
    np.testing.assert_allclose(ours, theirs, atol=2e-3)  # angles reach 1570, float32 keeps them to 1e-4


def test_sizes_of_the_configuration(tmp_path):
    arrays = layouts.random(layouts.openpi(TINY, "pi05"))
    layouts.save_openpi(tmp_path / "theirs", arrays, value=True)
    model = open_weights(tmp_path / "theirs", "openpi", Options(horizon=15)).model
    assert dataclasses.asdict(model.expert) == dict(
        kind="joint",
        width=24,
        mlp=20,
        time="adarms",
        clock="reversed",
        state_token=False,
        horizon=15,
        action_dim=5,
        state_dim=5,
        padding="noise",
    )
    assert (
        model.backbone.vision.image_size == 8
        and model.backbone.vision.heads == 16
        and model.backbone.text.vocab == TINY.vocab
    )


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_the_backbone_of_a_pi0_alone(tmp_path, kind):
    """All but the action expert, which is read for the checksums all the same, and is said to be left out."""
    layouts.save_openpi(tmp_path / "theirs", layouts.random(layouts.openpi(TINY, kind)), value=True)
    convert(tmp_path / "theirs", tmp_path / "ours", source="openpi", target="vla_jax", dtype="float32")
    report = convert(tmp_path / "ours", tmp_path / "out", source="vla_jax", target="paligemma_hf")
    convert(tmp_path / "out", tmp_path / "again", source="paligemma_hf", target="vla_jax")
    ours, again = (flat(load(tmp_path / run, "params")) for run in ("ours", "again"))
    expert = {name for name in ours if name.startswith("expert/")}
    assert report.without_expert == len(expert) > 5 and report.silenced == 0
    assert set(again) == set(ours) - expert
    for name, array in again.items():
        np.testing.assert_array_equal(array, ours[name], err_msg=name)
