"""π0.5's pretraining at its size (arXiv:2504.16054): the backbone alone learns text, and actions as FAST tokens.

python -m launch.compile --config configs/pi05_pretrain.py --topology v5e:16x16
python -m launch.train --config configs/pi05_pretrain.py --run-dir runs/pi05 --data.path data/mixture

The paper has CE + α · flow matching, with α = 0 for these 280,000 steps and α = 10 for 80,000 of post-training.
So the expert rests here: its parameters are drawn, frozen and saved, for the post-training, which has both losses:

python -m launch.train --config configs/pi05_pretrain.py --run-dir runs/pi05_post --train.init-from runs/pi05 \
    --data.path data/target --train.steps 80_000 --objective.action-weight 10 --optim.freeze

With knowledge insulation (arXiv:2505.23705) instead, both are trained from the start, with `--objective.insulation 0`.
200 text tokens, of which up to 64 are targets, and up to 256 FAST tokens per chunk.
"""

import dataclasses

from vla_jax.config import TrainConfig
from vla_jax.data.config import DataConfig
from vla_jax.data.fast.config import FastConfig
from vla_jax.models import presets
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.sharding.config import MeshConfig
from vla_jax.train.config import LoopConfig, OptimConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(presets.pi05(), remat="save_attention"),
        objective=ObjectiveConfig(text=True, action_weight=0.0),
        data=DataConfig(
            prompt="pi05",
            max_text_tokens=200,
            max_target_tokens=64,
            image_size=224,
            normalization="quantile",
            action_tokens=True,
            fast=FastConfig(max_tokens=256),
        ),
        optim=OptimConfig(
            learning_rate=5e-5,
            warmup_fraction=0.01,
            weight_decay=0.01,
            clip="per_group",
            freeze=("expert/**",),
        ),
        train=LoopConfig(batch_size=2048, steps=280_000, ema_decay=0.999, save_every=5000, log_every=100),
        mesh=MeshConfig(data=-1, fsdp=64),
    )
