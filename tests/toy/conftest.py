import jax
import pytest

from vla_jax.flow.config import SolverConfig
from vla_jax.toy.laws import LAWS
from vla_jax.toy.train import ToyConfig, train


@pytest.fixture(scope="module")
def optimised():
    """For tests that train, where compiling is the smaller part."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)  # other files share this process


@pytest.fixture(scope="module")
def diffusion(optimised):
    """Noise prediction on eight Gaussians, on the path of the VP SDE."""
    config = ToyConfig(
        process="ddpm",
        path="vp",
        width=128,
        depth=2,
        steps=1500,
        batch_size=1024,
        learning_rate=3e-3,
        ema=0.995,
    )
    return train(LAWS["gmm"], config, seed=0)


@pytest.fixture(scope="module")
def checkerboard(optimised):
    """About a quarter of the launcher's training."""
    return train(LAWS["checkerboard"], ToyConfig(steps=800), seed=0)


def solver(method, steps, **other):
    return SolverConfig(method=method, num_steps=steps, **other)
