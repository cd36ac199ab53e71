"""π0.5's pretraining at its size (arXiv:2504.16054): as π0, with text targets, the state in the prompt, adaRMS.

python -m launch.compile --config configs/pi05_pretrain.py --topology v5e:16x16
python -m launch.train --config configs/pi05_pretrain.py --run-dir runs/pi05 --data.path data/mixture

200 text tokens, of which up to 64 are targets; the action loss does not reach the backbone (knowledge insulation).
"""

from vla_jax.config import TrainConfig
from vla_jax.data.config import DataConfig
from vla_jax.models import presets
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.sharding.config import MeshConfig
from vla_jax.train.config import LoopConfig, OptimConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=presets.pi05(),
        objective=ObjectiveConfig(text=True, insulation=0.0, action_weight=1.0, plan_visible=0.5),
        data=DataConfig(max_text_tokens=200, max_target_tokens=64, image_size=224, normalization="quantile"),
        optim=OptimConfig(learning_rate=5e-5, warmup_fraction=0.01, weight_decay=0.01, clip="per_group"),
        train=LoopConfig(batch_size=2048, steps=280_000, ema_decay=0.999, save_every=5000, log_every=100),
        mesh=MeshConfig(data=-1, fsdp=64),
    )
