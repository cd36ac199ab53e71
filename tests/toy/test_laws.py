"""The laws know themselves: density, samples and the perfect denoiser belong together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.flow.schedules import VP, CondOT, Cosine
from vla_jax.toy.laws import LAWS, field
from vla_jax.toy.measure import entropy

ENTROPY = {"ring": 0.949, "checkerboard": np.log(32), "moons": 2.395, "gmm": 3.474}


@pytest.fixture(params=LAWS.values(), ids=LAWS)
def law(request):
    return request.param


def grid(law, side):
    edge = 1.2 * law.extent
    line = np.linspace(-edge, edge, side, endpoint=False, dtype=np.float32) + np.float32(edge / side)
    points = jnp.asarray(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2))
    return points, (2 * edge / side) ** 2, edge


def test_density_is_that_of_the_samples(law):
    """It integrates to 1, has the entropy of the docstring, and every cell of a histogram has its share."""
    points, area, edge = grid(law, 240)
    density = np.exp(np.asarray(law.log_prob(points), np.float64))
    assert density.sum() * area == pytest.approx(1, abs=2e-3)
    assert entropy(law) == pytest.approx(ENTROPY[law.name], abs=5e-3)
    x = np.asarray(law.sample(jax.random.key(0), 50_000).x)
    counts, *_ = np.histogram2d(*x.T[::-1], bins=12, range=[[-edge, edge]] * 2)
    expected = 50_000 * area * density.reshape(12, 20, 12, 20).sum((1, 3))
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected.max())
    assert np.sqrt(x.var(0).mean()) == pytest.approx(law.spread, rel=0.01)


@pytest.mark.parametrize("schedule", [CondOT(), VP()], ids=["cond_ot", "vp"])
@pytest.mark.parametrize("t", [0.3, 0.7])
def test_perfect_denoiser_is_the_mean_of_data_given_x(law, schedule, t):
    """Against 100,000 data points, each weighted by how likely it makes x: the mean's definition."""
    data = law.sample(jax.random.key(1), 100_000).x
    noise = jax.random.normal(jax.random.key(2), (8, 2))
    clock = jnp.full(8, t)
    alpha, sigma = schedule.alpha(clock[0]), schedule.sigma(clock[0])
    x = alpha * data[:8] + sigma * noise
    weight = jax.nn.softmax(-jnp.sum((x[:, None] - alpha * data) ** 2, axis=-1) / sigma**2 / 2, axis=1)
    samples = 1 / jnp.sum(weight**2, axis=1)  # effective number
    expected = weight @ data
    deviation = jnp.sqrt(jnp.sum(weight[..., None] * (data - expected[:, None]) ** 2, axis=(1, 2)) / samples)
    distance = jnp.linalg.norm(law.x1(x, clock, schedule) - expected, axis=1)
    assert samples.min() > 30 and (distance < 4.5 * deviation + 1e-4).all()


def test_velocity_carries_the_score_of_the_density(law):
    """Near data, the score implied by the perfect field is the gradient of the exact density (inside the support)."""
    t = jnp.full(200, 0.97 if law.name != "ring" else 0.995)
    x1 = law.sample(jax.random.key(3), 200).x
    x = t[:, None] * x1
    score = field(law, CondOT(), "score")(x, t)
    sharp = jax.grad(lambda x: law.log_prob(x).sum())(x1) / t[:, None]
    if law.name == "checkerboard":  # flat inside; the noise reaches 0.1 from an edge
        inside = (jnp.abs(x1 % 2 - 1) < 0.8).all(1)
        assert inside.sum() > 50
        assert jnp.abs(score[inside]).max() < 0.02
    else:
        assert jnp.linalg.norm(score - sharp) < 0.1 * jnp.linalg.norm(sharp)


def test_gaussians_agree_with_the_oracle():
    law = LAWS["gmm"]
    x, t = 3 * jax.random.normal(jax.random.key(4), (50, 2)), jnp.linspace(0.02, 0.95, 50)
    for schedule in (CondOT(), Cosine()):
        oracle = law.oracle(schedule)
        np.testing.assert_allclose(
            field(law, schedule, "velocity")(x, t), oracle.velocity(x, t), rtol=2e-3, atol=2e-3
        )
        np.testing.assert_allclose(field(law, schedule, "eps")(x, t), oracle.eps(x, t), rtol=2e-3, atol=2e-3)


def test_classes_are_places():
    """Labels of the Gaussians and moons name the centre that a point was drawn around."""
    x, label = LAWS["gmm"].sample(jax.random.key(5), 2000)
    angle = jnp.round(jnp.arctan2(x[:, 1], x[:, 0]) / (jnp.pi / 4)).astype(int) % 8
    assert (angle == label).mean() > 0.95 and set(np.unique(label)) == set(range(8))
    x, label = LAWS["moons"].sample(jax.random.key(6), 2000)
    ends = jnp.abs(x[:, 0]) > 2.2
    assert ((x[ends, 0] > 0) == (label[ends] == 1)).mean() > 0.99
