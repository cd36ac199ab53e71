"""Our backbone against transformers' PaliGemma with the same random weights, in float32."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from tests.models import small
from tests.parity.hugging_face import backbone
from vla_jax.models.backbones import paligemma
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.tokens import TokensConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.models.generate import generate
from vla_jax.models.vla import VLA

IMAGE = small.VOCAB + 1  # a token id outside the vocabulary stands for an image patch


def to_torch(params, cfg) -> dict[str, torch.Tensor]:
    """Our parameters under transformers' names; every transpose written out."""
    img, llm = params["backbone"]["img"], params["backbone"]["llm"]
    width = cfg.backbone.vision.width
    vision, text = "model.vision_tower", "model.language_model"
    out = {
        f"{vision}.embeddings.patch_embedding.weight": img["embedding"]["kernel"].transpose(3, 2, 0, 1),
        f"{vision}.embeddings.patch_embedding.bias": img["embedding"]["bias"],
        f"{vision}.embeddings.position_embedding.weight": img["pos_embedding"][0],
        f"{vision}.post_layernorm.weight": img["Transformer"]["encoder_norm"]["scale"],
        f"{vision}.post_layernorm.bias": img["Transformer"]["encoder_norm"]["bias"],
        "model.multi_modal_projector.linear.weight": img["head"]["kernel"].T,
        "model.multi_modal_projector.linear.bias": img["head"]["bias"],
        f"{text}.embed_tokens.weight": llm["embedder"]["input_embedding"],
        "lm_head.weight": llm["embedder"]["input_embedding"],
        f"{text}.norm.weight": llm["final_norm"]["scale"],
    }
    for i in range(cfg.backbone.vision.depth):
        block = jax.tree.map(lambda x: x[i], img["Transformer"]["encoderblock"])
        name = f"{vision}.encoder.layers.{i}"
        for ours, theirs in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
            out[f"{name}.{theirs}.weight"] = block[ours]["scale"]
            out[f"{name}.{theirs}.bias"] = block[ours]["bias"]
        attention = block["MultiHeadDotProductAttention_0"]
        for ours, theirs in (
            ("query", "q_proj"),
            ("key", "k_proj"),
            ("value", "v_proj"),
            ("out", "out_proj"),
        ):
            out[f"{name}.self_attn.{theirs}.weight"] = attention[ours]["kernel"].reshape(width, width).T
            out[f"{name}.self_attn.{theirs}.bias"] = attention[ours]["bias"].reshape(-1)
        for ours, theirs in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            out[f"{name}.mlp.{theirs}.weight"] = block["MlpBlock_0"][ours]["kernel"].T
            out[f"{name}.mlp.{theirs}.bias"] = block["MlpBlock_0"][ours]["bias"]
    heads, d = cfg.backbone.text.heads * cfg.backbone.text.head_dim, cfg.backbone.text.width
    for i in range(cfg.backbone.text.depth):
        block = jax.tree.map(lambda x: x[i], llm["layers"])
        name = f"{text}.layers.{i}"
        kv = block["attn"]["kv_einsum"]["w"]
        out[f"{name}.self_attn.q_proj.weight"] = (
            block["attn"]["q_einsum"]["w"].transpose(0, 2, 1).reshape(heads, d)
        )
        out[f"{name}.self_attn.k_proj.weight"] = kv[0].transpose(0, 2, 1).reshape(-1, d)
        out[f"{name}.self_attn.v_proj.weight"] = kv[1].transpose(0, 2, 1).reshape(-1, d)
        out[f"{name}.self_attn.o_proj.weight"] = block["attn"]["attn_vec_einsum"]["w"].reshape(heads, d).T
        out[f"{name}.mlp.gate_proj.weight"] = block["mlp"]["gating_einsum"][0].T
        out[f"{name}.mlp.up_proj.weight"] = block["mlp"]["gating_einsum"][1].T
        out[f"{name}.mlp.down_proj.weight"] = block["mlp"]["linear"].T
        out[f"{name}.input_layernorm.weight"] = block["pre_attention_norm"]["scale"]
        out[f"{name}.post_attention_layernorm.weight"] = block["pre_ffw_norm"]["scale"]
    # numpy arrays are not copied: the full-width layer is half a gigabyte
    return {name: torch.as_tensor(x if isinstance(x, np.ndarray) else np.array(x)) for name, x in out.items()}


def load_reference(params, cfg) -> PaliGemmaForConditionalGeneration:
    reference = PaliGemmaForConditionalGeneration(PaliGemmaConfig(**backbone(cfg, IMAGE)))
    missing, unexpected = reference.load_state_dict(to_torch(params, cfg), strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return reference.eval()


@pytest.fixture(scope="module")
def setup():
    cfg = small.config()
    data = small.batch(cfg)
    data = data.replace(image_mask={n: jnp.ones(3, bool) for n in cfg.cameras})
    model, params = small.init(cfg, data)
    return cfg, data, model, params, load_reference(params, cfg)


def inputs(cfg, data, image=IMAGE) -> dict[str, torch.Tensor]:
    """Images first, in the order of our cameras, then the text as it stands."""
    b = data.tokens.shape[0]
    patches = cfg.backbone.vision.tokens * len(cfg.cameras)
    ids = np.concatenate([np.full((b, patches), image), data.tokens], 1)
    valid = np.concatenate([np.ones((b, patches), bool), data.token_mask], 1)
    suffix = np.concatenate([np.zeros((b, patches), bool), data.token_causal], 1)
    images = np.stack([data.images[n] for n in cfg.cameras], 1).reshape(-1, *data.images["top"].shape[1:])
    return {
        "input_ids": torch.tensor(ids),
        "pixel_values": torch.tensor(images / 127.5 - 1.0, dtype=torch.float32).permute(0, 3, 1, 2),
        "attention_mask": torch.tensor(valid.astype(np.int64)),
        "token_type_ids": torch.tensor(suffix.astype(np.int64)),
    }


def padded_in_front(given: dict[str, torch.Tensor], widths: list[int], total: int) -> dict[str, torch.Tensor]:
    """Each row moved to the right by its width, in rows that are `total` longer; padding is invalid token 0."""
    out = {"pixel_values": given["pixel_values"]}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        rows = [torch.nn.functional.pad(row, (n, total - n)) for row, n in zip(given[name], widths)]
        out[name] = torch.stack(rows)
    return out


def reference_logits(cfg, data, reference):
    """Logits at the text positions."""
    with torch.no_grad():
        out = reference(**inputs(cfg, data))
    return out.logits[:, -data.tokens.shape[1] :].numpy()


def our_logits(model, params, data):
    return jax.jit(lambda p: model.apply({"params": p}, data, data.actions, jnp.zeros(3))[1])(params)


def error(ours, theirs, mask):
    scale = np.abs(theirs[mask]).max()
    return np.abs(np.asarray(ours)[mask] - theirs[mask]).max() / scale


def test_logits_with_images_prompt_and_target(setup):
    cfg, data, model, params, reference = setup
    want, mask = reference_logits(cfg, data, reference), np.asarray(data.token_mask)
    assert error(our_logits(model, params, data), want, mask) < 1e-5


def test_a_wrong_mask_position_or_scale_would_show(setup):
    """The tolerance is tight enough: each of these mistakes is at least a hundred times larger."""
    cfg, data, model, params, reference = setup
    want, mask = reference_logits(cfg, data, reference), np.asarray(data.token_mask)
    causal_from = data.replace(token_causal=data.token_mask)  # the whole prompt causal
    shifted = data.replace(token_causal=jnp.zeros_like(data.token_causal))  # the target bidirectional
    scaled = jax.tree.map(lambda x: x, params)
    scaled["backbone"]["img"]["head"] = jax.tree.map(lambda x: x * 1.05, scaled["backbone"]["img"]["head"])
    assert error(our_logits(model, params, causal_from), want, mask) > 1e-3
    assert error(our_logits(model, params, shifted), want, mask) > 1e-3
    assert error(our_logits(model, scaled, data), want, mask) > 1e-3


def test_padding_on_both_ends(setup):
    """Theirs has padding before the images and behind the text; ours between images and text, and behind it."""
    cfg, data, model, params, reference = setup
    front, total = [3, 0, 2], 3
    given = padded_in_front(inputs(cfg, data), front, total)
    with torch.no_grad():
        all_logits = reference(**given).logits.numpy()
    patches, length = cfg.backbone.vision.tokens * len(cfg.cameras), data.tokens.shape[1]
    want = np.stack([row[n + patches : n + patches + length] for row, n in zip(all_logits, front)])

    def moved(x):
        rows = [np.pad(row, (n, total - n)) for row, n in zip(np.asarray(x), front)]
        return jnp.asarray(np.stack(rows))

    names = ("tokens", "token_mask", "token_causal", "token_loss")
    ours = data.replace(**{name: moved(getattr(data, name)) for name in names})
    got = np.asarray(our_logits(model, params, ours))
    got = np.stack([row[n : n + length] for row, n in zip(got, front)])
    assert error(got, want, np.asarray(data.token_mask)) < 1e-5
    with pytest.MonkeyPatch.context() as patch:  # positions that count padding
        patch.setattr(
            paligemma,
            "token_positions",
            lambda valid: jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape),
        )
        wrong = np.asarray(our_logits(model, params, ours))
    wrong = np.stack([row[n : n + length] for row, n in zip(wrong, front)])
    assert error(wrong, want, np.asarray(data.token_mask)) > 1e-3


def test_twenty_greedy_tokens(setup):
    """Prompts of different lengths: theirs padded in front, ours behind."""
    cfg, data, model, params, reference = setup
    prompts, keys = small.without_target(data), jax.random.split(jax.random.key(0), 3)
    made = jax.jit(lambda p: generate(model, p, prompts, keys, max_tokens=20, eos=small.VOCAB + 5))(params)
    lengths = np.asarray(prompts.token_mask).sum(1)
    longest, patches = int(lengths.max()), cfg.backbone.vision.tokens * len(cfg.cameras)
    given = padded_in_front(inputs(cfg, prompts), [longest - n for n in lengths], longest)
    given = {name: x if name == "pixel_values" else x[:, : patches + longest] for name, x in given.items()}
    with torch.no_grad():
        theirs = reference.generate(
            **given, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0,
            suppress_tokens=None,
        )  # fmt: skip
    np.testing.assert_array_equal(made.tokens, theirs[:, patches + longest :].numpy())
    assert len({tuple(row) for row in np.asarray(made.tokens)}) == 3 and (np.asarray(made.mask)).all()


def test_one_layer_of_full_width():
    """SigLIP So400m's and Gemma 2B's layer (width 1152 and 2048, 16 and 8 heads), one each, and their norms."""
    cfg = dataclasses.replace(
        small.config(),
        backbone=paligemma.PaliGemmaConfig(
            vision=VisionConfig(image_size=28, patch=14, width=1152, depth=1, mlp=4304, heads=16),
            text=TextConfig(
                vocab=small.VOCAB, width=2048, depth=1, mlp=16_384, heads=8, kv_heads=1, head_dim=256
            ),
        ),
        expert=TokensConfig(horizon=5, action_dim=3, state_dim=4),
    )
    data = small.batch(cfg)
    data = data.replace(image_mask={n: jnp.ones(3, bool) for n in cfg.cameras})
    shapes = jax.eval_shape(VLA(cfg).init, jax.random.key(0), data, None, jnp.zeros(3))
    rng = np.random.default_rng(0)

    def weight(path, leaf):
        """Of about the size that training leaves: a matrix keeps the variance of what it is given."""
        name = jax.tree_util.keystr(path)
        spread = 0.1 if leaf.ndim < 3 or "embed" in name else np.prod(leaf.shape[-3:-1]) ** -0.5
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(min(spread, 0.1))

    params = jax.tree_util.tree_map_with_path(weight, nn.unbox(shapes)["params"])
    want, mask = reference_logits(cfg, data, load_reference(params, cfg)), np.asarray(data.token_mask)
    got = our_logits(VLA(cfg), params, data)
    assert np.abs(want[mask]).max() > 0.1
    assert error(got, want, mask) < 1e-4
    wrong = data.replace(token_causal=jnp.zeros_like(data.token_causal))
    assert error(our_logits(VLA(cfg), params, wrong), want, mask) > 1e-3


def test_same_parameter_count(setup):
    _, _, _, params, reference = setup
    ours = sum(x.size for x in jax.tree.leaves(params["backbone"]))
    assert ours == sum(p.numel() for p in reference.parameters())  # the tied output is one parameter
