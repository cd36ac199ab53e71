"""Named sizes, from a laptop to the public models. Each public one has a tiny twin of the same structure."""

import dataclasses
from collections.abc import Callable

from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.experts.tokens import TokensConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.models.kinds import required

PI0_CAMERAS = ("base", "left_wrist", "right_wrist")


def tiny(horizon: int = 8) -> VLAConfig:
    """About a million parameters: trains on two CPU cores in minutes."""
    return VLAConfig(
        backbone=PaliGemmaConfig(
            vision=VisionConfig(image_size=64, patch=8, width=128, depth=2, mlp=256, heads=4),
            text=TextConfig(width=128, depth=3, mlp=256, heads=4, kv_heads=1, head_dim=32),
        ),
        expert=JointConfig(width=128, mlp=256, horizon=horizon),
        unroll=3,
    )


def paligemma_3b_224() -> VLAConfig:
    """PaliGemma 3B (arXiv:2407.07726), 256 tokens per image.

    The backbone is the public model; the expert beside it is π0's, new, for actions as the data set has them.
    """
    return _paligemma_3b(224)


def paligemma_3b_448() -> VLAConfig:
    """PaliGemma 3B at 448 pixels: 1024 tokens per image."""
    return _paligemma_3b(448)


def paligemma_3b_896() -> VLAConfig:
    """PaliGemma 3B at 896 pixels: 4096 tokens per image."""
    return _paligemma_3b(896)


def pi0() -> VLAConfig:
    """π0 (arXiv:2410.24164): PaliGemma 3B and a 311M expert, chunks of 50 actions of 32 dimensions."""
    return dataclasses.replace(
        paligemma_3b_224(),
        expert=JointConfig(
            width=1024, mlp=4096, time="mlp", clock="reversed", horizon=50, action_dim=32, state_dim=32
        ),
        cameras=PI0_CAMERAS,
    )


def pi05() -> VLAConfig:
    """π0.5 (arXiv:2504.16054): the time enters through adaptive norms, the state through the prompt."""
    model = pi0()
    expert = dataclasses.replace(model.expert, time="adarms", state_token=False)
    return dataclasses.replace(model, expert=expert)


def pi0_fast() -> VLAConfig:
    """π0-FAST (arXiv:2501.09747): the backbone alone, actions are text."""
    model = paligemma_3b_224()
    return dataclasses.replace(model, expert=TokensConfig(horizon=10), cameras=PI0_CAMERAS)


def twin(model: VLAConfig) -> VLAConfig:
    """A model of a few hundred thousand parameters that is built like `model`; the vocabulary is the data set's.

    Images of 224 pixels become 32, larger ones in proportion: 16, 64 or 256 tokens.
    """
    backbone = required(model.backbone, PaliGemmaConfig, "models.presets.twin")
    expert = dataclasses.replace(model.expert, horizon=8)
    if isinstance(expert, JointConfig):
        expert = dataclasses.replace(expert, width=32, mlp=32)
    return dataclasses.replace(
        model,
        backbone=dataclasses.replace(
            backbone,
            vision=VisionConfig(
                image_size=backbone.vision.image_size // 7, patch=8, width=48, depth=2, mlp=96, heads=4
            ),
            text=TextConfig(width=64, depth=2, mlp=128, heads=4, kv_heads=1, head_dim=16),
        ),
        expert=expert,
        dtype="float32",
        remat="none",
        unroll=2,
    )


def paligemma_tiny() -> VLAConfig:
    """Built like `paligemma_3b_224`."""
    return twin(paligemma_3b_224())


def paligemma_448_tiny() -> VLAConfig:
    """Built like `paligemma_3b_448`."""
    return twin(paligemma_3b_448())


def paligemma_896_tiny() -> VLAConfig:
    """Built like `paligemma_3b_896`."""
    return twin(paligemma_3b_896())


def pi0_tiny() -> VLAConfig:
    """Built like `pi0`."""
    return twin(pi0())


def pi05_tiny() -> VLAConfig:
    """Built like `pi05`."""
    return twin(pi05())


def pi0_fast_tiny() -> VLAConfig:
    """Built like `pi0_fast`."""
    return twin(pi0_fast())


PRESETS: dict[str, Callable[[], VLAConfig]] = {
    preset.__name__: preset
    for preset in (
        tiny,
        paligemma_3b_224,
        paligemma_3b_448,
        paligemma_3b_896,
        paligemma_tiny,
        paligemma_448_tiny,
        paligemma_896_tiny,
        pi0,
        pi0_tiny,
        pi05,
        pi05_tiny,
        pi0_fast,
        pi0_fast_tiny,
    )
}
"""All of them by name."""


def _paligemma_3b(image_size: int) -> VLAConfig:
    """SigLIP So400m/14 and Gemma 2B with PaliGemma's vocabulary (256,000 + 1024 locations + 128 segments)."""
    return VLAConfig(
        backbone=PaliGemmaConfig(
            vision=VisionConfig(image_size=image_size, patch=14, width=1152, depth=27, mlp=4304, heads=16),
            text=TextConfig(
                vocab=257_152, width=2048, depth=18, mlp=16_384, heads=8, kv_heads=1, head_dim=256
            ),
        ),
        expert=JointConfig(width=1024, mlp=4096, clock="reversed", horizon=50),
        cameras=("image",),
        dtype="bfloat16",
        remat="nothing_saveable",
    )
