"""Our backbone against transformers' PaliGemma with the same random weights, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from tests.models import small
from tests.parity.hugging_face import backbone

IMAGE = small.VOCAB + 1  # a token id outside the vocabulary stands for an image patch


def to_torch(params, cfg) -> dict[str, torch.Tensor]:
    """Our parameters under transformers' names; every transpose written out."""
    img, llm = params["backbone"]["img"], params["backbone"]["llm"]
    width = cfg.vision.width
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
    for i in range(cfg.vision.depth):
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
    heads, d = cfg.text.heads * cfg.text.head_dim, cfg.text.width
    for i in range(cfg.text.depth):
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
    return {name: torch.tensor(np.asarray(x)) for name, x in out.items()}


@pytest.fixture(scope="module")
def setup():
    cfg = small.config()
    data = small.batch(cfg)
    data = data.replace(image_mask={n: jnp.ones(3, bool) for n in cfg.cameras})
    model, params = small.init(cfg, data)
    reference = PaliGemmaForConditionalGeneration(PaliGemmaConfig(**backbone(cfg, IMAGE))).eval()
    missing, unexpected = reference.load_state_dict(to_torch(params, cfg), strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return cfg, data, model, params, reference


def reference_logits(cfg, data, reference):
    """Logits at the text positions; images first, in the order of our cameras."""
    b, length = data.tokens.shape
    patches = cfg.vision.tokens * len(cfg.cameras)
    ids = np.concatenate([np.full((b, patches), IMAGE), data.tokens], 1)
    valid = np.concatenate([np.ones((b, patches), bool), data.token_mask], 1)
    suffix = np.concatenate([np.zeros((b, patches), bool), data.token_causal], 1)
    images = np.stack([data.images[n] for n in cfg.cameras], 1).reshape(-1, *data.images["top"].shape[1:])
    pixels = torch.tensor(images / 127.5 - 1.0, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = reference(
            input_ids=torch.tensor(ids),
            pixel_values=pixels,
            attention_mask=torch.tensor(valid.astype(np.int64)),
            token_type_ids=torch.tensor(suffix.astype(np.int64)),
        )
    return out.logits[:, -length:].numpy()


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


def test_same_parameter_count(setup):
    _, _, _, params, reference = setup
    ours = sum(x.size for x in jax.tree.leaves(params["backbone"]))
    assert ours == sum(p.numel() for p in reference.parameters())  # the tied output is one parameter
