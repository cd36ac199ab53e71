import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.flow.oracle import GaussianMixture
from vla_jax.flow.schedules import VP, CondOT, Cosine, LinearVP, Polynomial
from vla_jax.flow.step_schedules import CosineSteps

SMOOTH = [CondOT(), Polynomial(3.0), Cosine(), LinearVP(), VP()]
ALL = [*SMOOTH, CosineSteps(100)]


@pytest.fixture(autouse=True, scope="module")
def float64():
    """Double precision, and programs that run for milliseconds compiled in a fifth of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", before)  # other files share this process


@pytest.fixture
def optimised():
    """For tests of the last digit: compiled as in earnest, where fused operations round differently."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def normal(seed, shape):
    """Standard normals from numpy: jax.random would compile a program for every shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def normals(seed, count, shape):
    """Several of them."""
    return [normal((seed, i), shape) for i in range(count)]


def name(schedule):
    return f"{type(schedule).__name__}{getattr(schedule, 'power', '')}"


@pytest.fixture(params=ALL, ids=name)
def schedule(request):
    return request.param


@pytest.fixture(params=SMOOTH, ids=name)
def smooth(request):
    return request.param


@pytest.fixture
def mixture():
    """Three bumps in the plane, of different weights and widths, on a path to choose."""

    def make(schedule):
        return GaussianMixture(
            weights=jnp.array([0.5, 0.3, 0.2]),
            means=jnp.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]),
            stds=jnp.array([[0.4, 0.6], [0.5, 0.3], [0.7, 0.5]]),
            schedule=schedule,
        )

    return make
