"""Fine-tuning of public weights on a robot's demonstrations; docs/fine_tuning.md has the recipes.

python -m launch.train --config configs/fine_tune.py --init-from runs/pi0 --run-dir runs/mine --data.path data/mine

The model's sizes come from --init-from; schedule and optimiser are π0's. The actions alone are learned; with texts to
learn in the data, --objective.text True.
"""

from vla_jax.config import TrainConfig
from vla_jax.data.config import DataConfig
from vla_jax.models import presets
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.train.config import LoopConfig, OptimConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=presets.pi0(),
        objective=ObjectiveConfig(text=False, plan_visible=0.0),
        data=DataConfig(prompt="pi0", max_text_tokens=48, image_size=224),
        optim=OptimConfig(
            learning_rate=2.5e-5, weight_decay=0.0, warmup_fraction=1 / 30, final_fraction=0.1, clip_norm=1.0
        ),
        train=LoopConfig(batch_size=32, steps=30_000, ema_decay=0.99, log_every=100, save_every=1000),
    )
