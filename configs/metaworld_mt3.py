"""Three MetaWorld tasks from one camera, trained on a CPU in under an hour.

python -m launch.collect --env metaworld:button-press-v3,drawer-open-v3,reach-v3*200 --episodes 120 \
    --out data/metaworld_mt3
python -m launch.train --config configs/metaworld_mt3.py --run-dir runs/metaworld_mt3
python -m launch.evaluate --checkpoint runs/metaworld_mt3 --episodes 20

Reach moves little and its goal is two pixels wide, so with one set of statistics its share of the loss would be
tiny: statistics are per task, and half of the samples come from it.
"""

from vla_jax.config import TrainConfig
from vla_jax.data.augment import AugmentConfig
from vla_jax.data.config import DataConfig
from vla_jax.flow.config import SolverConfig
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.train.config import LoopConfig, OptimConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=VLAConfig(
            backbone=PaliGemmaConfig(
                vision=VisionConfig(image_size=64, patch=16, width=128, depth=3, mlp=384, heads=4),
                text=TextConfig(width=128, depth=2, mlp=384, heads=4, kv_heads=1, head_dim=32),
            ),
            expert=JointConfig(width=128, mlp=384, horizon=8),
            unroll=3,
        ),
        solver=SolverConfig(method="euler", num_steps=10),
        execute=4,
        objective=ObjectiveConfig(text=False, noise_draws=4, plan_visible=0.0),
        data=DataConfig(
            path="data/metaworld_mt3",
            max_text_tokens=16,
            vocab_size=320,
            normalization_group="task",
            task_weights=("reach-v3:2", "button-press-v3:1", "drawer-open-v3:1"),
        ),
        augment=AugmentConfig(shift=1),
        optim=OptimConfig(learning_rate=1e-3, warmup_fraction=0.03, weight_decay=0.01),
        train=LoopConfig(
            batch_size=64,
            steps=10_000,
            ema_decay=0.999,
            log_every=20,
            val_every=1000,
            val_batches=8,
            save_every=500,
        ),
    )
