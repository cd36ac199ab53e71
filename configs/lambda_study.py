"""The λ study's model: the tabletop with little capacity, so that text and actions compete. See docs/lambda_study.md.

python -m launch.collect --env tabletop --episodes 10000 --out data/tabletop
python -m launch.sweep --config configs/lambda_study.py --out runs/lambda_study --seeds 3 \\
    --grid objective.action_weight=0,0.01,0.1,1,10,100 --grid objective.insulation=0,0.5,1
python -m launch.report --sweep runs/lambda_study
"""

from vla_jax.config import TrainConfig
from vla_jax.data.config import DataConfig
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.objectives.config import DiagnosticsConfig, ObjectiveConfig
from vla_jax.train.config import LoopConfig, OptimConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=VLAConfig(
            backbone=PaliGemmaConfig(
                vision=VisionConfig(image_size=32, patch=8, width=32, depth=1, mlp=64, heads=2),
                text=TextConfig(width=32, depth=2, mlp=64, heads=2, kv_heads=2, head_dim=16),
            ),
            expert=JointConfig(width=32, mlp=64, horizon=8),
            cameras=("top",),
        ),
        objective=ObjectiveConfig(
            noise_draws=2, plan_visible=0.35, diagnostics=DiagnosticsConfig(every=50, stride=2)
        ),
        data=DataConfig(
            path="data/tabletop",
            max_text_tokens=28,
            max_target_tokens=16,
            vocab_size=512,
            image_size=32,
            after_end="repeat",
        ),
        # One norm for both groups would let λ reach the backbone through the clip even under full insulation.
        optim=OptimConfig(
            learning_rate=3e-3, beta2=0.99, warmup_fraction=0.05, weight_decay=0.01, clip="per_group"
        ),
        train=LoopConfig(
            batch_size=16,
            steps=800,
            ema_decay=0.98,
            log_every=10,
            val_every=200,
            val_batches=8,
            save_every=200,
            tensorboard=False,
        ),
    )
