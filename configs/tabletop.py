"""The quickstart: a small flow-matching VLA on the tabletop.

python -m launch.collect --env tabletop --episodes 10000 --out data/tabletop
python -m launch.train --config configs/tabletop.py --run-dir runs/tabletop
python -m launch.evaluate --checkpoint runs/tabletop --episodes 512
"""

import dataclasses

from vla_jax.config import TrainConfig
from vla_jax.data.config import DataConfig
from vla_jax.data.fast.config import FastConfig
from vla_jax.models import presets
from vla_jax.models.config import VLAConfig
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.train.config import LoopConfig, OptimConfig


def model() -> VLAConfig:
    tiny = presets.tiny(horizon=16)
    return dataclasses.replace(
        tiny,
        backbone=dataclasses.replace(
            tiny.backbone,
            vision=dataclasses.replace(tiny.backbone.vision, patch=16),
            text=dataclasses.replace(tiny.backbone.text, kv_heads=4),
        ),  # at this width one head is too narrow to look things up
    )


def get_config() -> TrainConfig:
    return TrainConfig(
        model=model(),
        execute=1,  # half of a chunk at once ends in the obstacle: benchmarks/RESULTS.md
        objective=ObjectiveConfig(noise_draws=2, plan_visible=0.35),
        data=DataConfig(
            path="data/tabletop",
            max_text_tokens=28,
            max_target_tokens=16,
            vocab_size=512,
            after_end="repeat",  # or nothing would show when to close the gripper
            # For --data.action_tokens True. FAST's scale of 10 is meant for actions in [-1, 1]; ours go twice as far.
            fast=FastConfig(scale=5.0, vocab_size=512),
        ),
        optim=OptimConfig(algorithm="muon", learning_rate=2e-3, warmup_fraction=0.05, weight_decay=0.01),
        train=LoopConfig(
            batch_size=16,
            steps=3000,
            ema_decay=0.995,
            log_every=10,
            val_every=1000,
            val_batches=4,
            save_every=500,
        ),
    )
