"""The tiny preset with all its sizes, for a pod of 16 chips."""

import dataclasses

from vla_jax.config import TrainConfig
from vla_jax.data.config import DataConfig
from vla_jax.models import presets
from vla_jax.sharding.config import MeshConfig
from vla_jax.train.config import LoopConfig


def get_config() -> TrainConfig:
    tiny = presets.tiny()
    model = dataclasses.replace(
        tiny,
        backbone=dataclasses.replace(tiny.backbone, text=dataclasses.replace(tiny.backbone.text, vocab=512)),
        expert=dataclasses.replace(tiny.expert, action_dim=8, state_dim=8),
        cameras=("top",),
        dtype="bfloat16",
        remat="nothing_saveable",
        unroll=1,
    )
    return TrainConfig(
        model=model,
        data=DataConfig(max_text_tokens=32, max_target_tokens=8),
        train=LoopConfig(batch_size=32, steps=100),
        mesh=MeshConfig(data=-1, fsdp=16),
    )
