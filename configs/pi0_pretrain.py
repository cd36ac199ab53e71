"""π0's pretraining at its size (arXiv:2410.24164): PaliGemma 3B, a 311M expert, three cameras, chunks of 50 × 32.

python -m launch.compile --config configs/pi0_pretrain.py --topology v5e:16x16
python -m launch.train --config configs/pi0_pretrain.py --run-dir runs/pi0 --data.path data/mixture

2048 samples are 8 per chip on 256 chips. All sizes are here, so that compiling needs no data set.
"""

import dataclasses

from vla_jax.config import TrainConfig
from vla_jax.data.config import DataConfig
from vla_jax.models import presets
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.sharding.config import MeshConfig
from vla_jax.train.config import LoopConfig, OptimConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(presets.pi0(), remat="save_attention"),
        objective=ObjectiveConfig(text=False, plan_visible=0.0),
        data=DataConfig(max_text_tokens=48, image_size=224, normalization_group="task"),
        optim=OptimConfig(learning_rate=5e-5, warmup_fraction=0.01, weight_decay=0.01),
        train=LoopConfig(batch_size=2048, steps=700_000, ema_decay=0.999, save_every=5000, log_every=100),
        mesh=MeshConfig(data=-1, fsdp=64),
    )
