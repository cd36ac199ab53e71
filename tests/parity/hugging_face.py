"""Our sizes as transformers' configurations take them."""

from vla_jax.models.config import VLAConfig


def backbone(cfg: VLAConfig, image_token: int) -> dict:
    """Arguments of PaliGemmaConfig."""
    v = cfg.backbone.vision
    return dict(
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=v.width, intermediate_size=v.mlp,
            num_hidden_layers=v.depth, num_attention_heads=v.heads, image_size=v.image_size,
            patch_size=v.patch, vision_use_head=False,
        ),
        text_config=gemma(cfg, cfg.backbone.text.width, cfg.backbone.text.mlp)
        | dict(vocab_size=cfg.backbone.text.vocab, hidden_activation="gelu_pytorch_tanh"),
        projection_dim=cfg.backbone.text.width,
        image_token_index=image_token,
    )  # fmt: skip


def gemma(cfg: VLAConfig, width: int, mlp: int) -> dict:
    """A tower of the decoder's depth and heads, of its own width."""
    t = cfg.backbone.text
    return dict(
        model_type="gemma", hidden_size=width, intermediate_size=mlp, num_hidden_layers=t.depth,
        num_attention_heads=t.heads, num_key_value_heads=t.kv_heads, head_dim=t.head_dim,
    )  # fmt: skip
