"""A model of a few thousand parameters and random batches for it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.models.kinds import of_kind
from vla_jax.models.vla import VLA
from vla_jax.types import Batch

VOCAB, EOS = 40, 1


def config(kind: str = "joint", **expert) -> VLAConfig:
    return VLAConfig(
        backbone=PaliGemmaConfig(
            vision=VisionConfig(image_size=16, patch=8, width=24, depth=2, mlp=32, heads=2),
            text=TextConfig(vocab=VOCAB, width=32, depth=2, mlp=48, heads=4, kv_heads=2, head_dim=8),
        ),
        expert=of_kind(
            JointConfig(**{"width": 24, "mlp": 40, "horizon": 5, "action_dim": 3, "state_dim": 4} | expert),
            kind,
            "model.expert",
        ),
        cameras=("top", "wrist"),
    )


def batch(cfg: VLAConfig, b: int = 3, length: int = 12, seed: int = 0) -> Batch:
    """Prompts of 4-6 tokens, targets of 3-5 with an end token, some padding; the last sample lacks a camera."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(4, 7, b)
    target = rng.integers(3, 6, b)
    index = np.arange(length)[None]
    token_mask = index < (prompt + target)[:, None]
    is_target = (index >= prompt[:, None]) & token_mask
    tokens = np.where(token_mask, rng.integers(4, VOCAB, (b, length)), 0)
    tokens[np.arange(b), prompt + target - 1] = EOS
    size, e = cfg.backbone.vision.image_size, cfg.expert
    present = {name: np.ones(b, bool) for name in cfg.cameras}
    if "wrist" in present:
        present["wrist"][-1] = False
    steps = rng.integers(2, e.horizon + 1, b)
    action_mask = np.broadcast_to(
        (np.arange(e.horizon)[None] < steps[:, None])[..., None], (b, e.horizon, e.action_dim)
    )
    return jax.tree.map(
        jnp.asarray,
        Batch(
            images={n: rng.integers(0, 256, (b, size, size, 3), dtype=np.uint8) for n in cfg.cameras},
            image_mask=present,
            state=rng.normal(size=(b, e.state_dim)).astype(np.float32),
            tokens=tokens.astype(np.int32),
            token_mask=token_mask,
            token_causal=is_target,
            token_loss=is_target,
            actions=rng.normal(size=(b, e.horizon, e.action_dim)).astype(np.float32),
            action_mask=action_mask.copy(),
        ),
    )


def init(cfg: VLAConfig, data: Batch, seed: int = 0):
    """Model and parameters; every parameter is moved off its special start value (zeros, ones)."""
    model = VLA(cfg)

    @jax.jit  # one program: eager operations would be compiled one by one
    def make(key):
        params = nn.unbox(model.init(key, data, data.actions, jnp.zeros(data.state.shape[0])))["params"]
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        return tree.unflatten([p + 0.1 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves)])

    return model, make(jax.random.key(seed))


def without_target(data: Batch) -> Batch:
    return data.replace(
        tokens=jnp.where(data.token_causal, 0, data.tokens),
        token_mask=data.token_mask & ~data.token_causal,
        token_causal=jnp.zeros_like(data.token_causal),
        token_loss=jnp.zeros_like(data.token_loss),
    )


def replace_expert(cfg: VLAConfig, **changes) -> VLAConfig:
    return dataclasses.replace(cfg, expert=dataclasses.replace(cfg.expert, **changes))
