"""Drawn shapes, small enough for two CPU cores.

python -m launch.images --config configs/images/shapes.py --out runs/shapes
"""

from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.models.unet import UNetConfig
from vla_jax.toy.train_images import ImagesConfig


def get_config() -> ImagesConfig:
    return ImagesConfig(
        data="shapes",
        model=UNetConfig(width=32, multiples=(1, 2, 2), blocks=1, classes=4),
        process=ProcessConfig(time="uniform"),
        solver=SolverConfig(method="midpoint", num_steps=20),
        steps=1000,
        batch_size=32,
        learning_rate=1e-3,
        ema=0.99,
    )
