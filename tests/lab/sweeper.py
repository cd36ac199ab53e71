"""launch.sweep on a small model, in a process that can be killed.

python -m tests.lab.sweeper KILL_AFTER_SAVES [options of launch.sweep]
"""

import os
import signal
import sys

from vla_jax.checkpoint import Checkpoints
from vla_jax.config import TrainConfig
from vla_jax.data.config import DataConfig
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.objectives.config import DiagnosticsConfig, ObjectiveConfig
from vla_jax.train.config import LoopConfig, OptimConfig

GRID = ("objective.action_weight=0,0.5,5",)
SEEDS = 2
EPISODES = 2
STEPS = 4
FILE = """
from tests.lab.sweeper import base

def get_config():
    return base({path!r})
"""


def base(path: str) -> TrainConfig:
    return TrainConfig(
        model=VLAConfig(
            backbone=PaliGemmaConfig(
                vision=VisionConfig(image_size=16, patch=8, width=16, depth=1, mlp=16, heads=2),
                text=TextConfig(width=16, depth=1, mlp=16, heads=2, kv_heads=1, head_dim=8),
            ),
            expert=JointConfig(width=16, mlp=16, horizon=8),
        ),
        objective=ObjectiveConfig(diagnostics=DiagnosticsConfig(every=2, stride=1, time_bins=2)),
        data=DataConfig(path=path, image_size=16, val_episodes=2),
        optim=OptimConfig(learning_rate=3e-3, clip="per_group"),
        train=LoopConfig(
            batch_size=4,
            steps=STEPS,
            log_every=1,
            val_every=2,
            val_batches=1,
            save_every=1,
            tensorboard=False,
        ),
    )


def main() -> None:
    from vla_jax.cli import sweep
    from vla_jax.cli.command import run

    left, save = int(sys.argv.pop(1)), Checkpoints.save

    def save_and_die(self, *args):
        nonlocal left
        save(self, *args)
        left -= 1
        if left == 0:  # the background write has hardly begun
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save = save_and_die
    run(sweep.main)


if __name__ == "__main__":
    main()
