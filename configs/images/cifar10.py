"""CIFAR-10: 50 epochs of 391 batches of 128, for a GPU or TPU. The files come from you (binary version):

python -m launch.images --config configs/images/cifar10.py --path cifar-10-batches-bin --out runs/cifar10
"""

from pathlib import Path

from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.models.unet import UNetConfig
from vla_jax.toy.train_images import ImagesConfig


def get_config() -> ImagesConfig:
    return ImagesConfig(
        data="cifar10",
        path=Path("cifar-10-batches-bin"),
        model=UNetConfig(width=128, multiples=(1, 2, 2, 2), blocks=2, dropout=0.1, classes=10),
        process=ProcessConfig(time="uniform"),
        solver=SolverConfig(method="midpoint", num_steps=50),
        steps=50 * 391,
        batch_size=128,
        learning_rate=1e-4,
        ema=0.9995,
    )
