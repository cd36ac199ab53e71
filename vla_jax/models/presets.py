"""Named sizes, from a laptop to the public models."""

from vla_jax.models.config import ExpertConfig, TextConfig, VisionConfig, VLAConfig


def tiny(horizon: int = 8) -> VLAConfig:
    """About a million parameters: trains on two CPU cores in minutes."""
    return VLAConfig(
        vision=VisionConfig(image_size=64, patch=8, width=128, depth=2, mlp=256, heads=4),
        text=TextConfig(width=128, depth=3, mlp=256, heads=4, kv_heads=1, head_dim=32),
        expert=ExpertConfig(width=128, mlp=256, horizon=horizon),
        unroll=3,
    )


def _so400m(image_size: int) -> VisionConfig:
    """SigLIP So400m/14."""
    return VisionConfig(image_size=image_size, patch=14, width=1152, depth=27, mlp=4304, heads=16)


def _gemma_2b() -> TextConfig:
    """Gemma 2B with PaliGemma's vocabulary (256,000 + 1024 locations + 128 segments)."""
    return TextConfig(vocab=257_152, width=2048, depth=18, mlp=16_384, heads=8, kv_heads=1, head_dim=256)


def pi0(image_size: int = 224) -> VLAConfig:
    """π0 (arXiv:2410.24164): PaliGemma 3B and a 311M expert, chunks of 50 actions of 32 dimensions."""
    return VLAConfig(
        vision=_so400m(image_size),
        text=_gemma_2b(),
        expert=ExpertConfig(width=1024, mlp=4096, time="mlp", horizon=50, action_dim=32, state_dim=32),
        cameras=("base", "left_wrist", "right_wrist"),
        dtype="bfloat16",
        remat="nothing_saveable",
    )


def pi05(image_size: int = 224) -> VLAConfig:
    """π0.5 (arXiv:2504.16054): the time enters through adaptive norms, the state through the prompt."""
    return VLAConfig(
        vision=_so400m(image_size),
        text=_gemma_2b(),
        expert=ExpertConfig(
            width=1024, mlp=4096, time="adarms", state_token=False, horizon=50, action_dim=32, state_dim=32
        ),
        cameras=("base", "left_wrist", "right_wrist"),
        dtype="bfloat16",
        remat="nothing_saveable",
    )
