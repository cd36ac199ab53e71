"""Trained networks against the exact fields and laws; docs/flow.md has the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toy.conftest import solver
from vla_jax.toy import measure
from vla_jax.toy.laws import LAWS
from vla_jax.toy.train import ToyConfig, train

pytestmark = pytest.mark.usefixtures("optimised")

TUTORIAL = dict(network="plain", time="uniform", steps=5000, batch_size=256, learning_rate=1e-3, ema=0.99)


def test_checkerboard(checkerboard):
    """After about a quarter of the launcher's steps: NLL below 3.6 (entropy 3.466), 93 % of samples in support."""
    assert measure.entropy(checkerboard.law) == pytest.approx(np.log(32), abs=1e-4)
    nll = measure.nll(checkerboard, n=1024, steps=40)
    quality = measure.quality(checkerboard, solver("midpoint", 20))
    assert np.log(32) - 0.03 < nll < 3.6  # never below the entropy but for the sample's noise
    assert quality.in_support > 0.93 and quality.nfe == 40 and quality.energy_distance < 0.01


def test_velocity_becomes_the_marginal_one(checkerboard):
    """Trained on the conditional target alone, the network reaches E[target | x_t], not the target."""
    error = measure.time_error(checkerboard, np.array([0.2, 0.5, 0.8]))
    assert (error.error < 0.03 * error.size).all()
    assert (error.error < 0.02 * error.floor).all()  # the target itself is this far from its mean
    np.testing.assert_allclose(error.loss, error.floor, rtol=0.05)


def test_noise_and_score_are_one_training():
    """Denoising score matching and noise prediction go through the same networks, up to the sign."""
    shared = dict(path="vp", time="uniform", width=32, depth=1, steps=50, batch_size=64)
    eps = train(LAWS["gmm"], ToyConfig(process="ddpm", **shared), seed=0)
    score = train(LAWS["gmm"], ToyConfig(process="score", **shared), seed=0)
    x, t = jax.random.normal(jax.random.key(1), (64, 2)), jnp.linspace(0.05, 0.95, 64)
    np.testing.assert_allclose(score.predict(x, t), -eps.predict(x, t), rtol=0.02, atol=0.02)
    assert jnp.abs(eps.predict(x, t)).max() > 0.5


def test_score_of_a_trained_network(diffusion):
    """The exact score where the data are. Nearly at the data a short training leaves 14 %, the long one of
    benchmarks/RESULTS.md 4 %."""
    error = measure.time_error(diffusion, np.array([0.1, 0.5, 0.9]), n=8192)
    assert (np.sqrt(error.error / error.size) < np.array([0.05, 0.05, 0.15])).all()


def test_all_noise_levels_are_learned(diffusion):
    """The loss is that of a perfect network within 3 % at every noise level, though it spans three decades."""
    error = measure.time_error(diffusion, np.linspace(0.05, 0.95, 10))
    assert error.floor.max() > 300 * error.floor.min()
    np.testing.assert_allclose(error.loss, error.floor, rtol=0.03)


def test_samplers_of_one_network_agree(diffusion):
    """Ancestral, DDIM, reverse SDE and probability-flow ODE draw one law: all near data, none further."""
    noise = measure.sampling_noise(diffusion.law, n=2000)
    found = {}
    for method, steps in (("ancestral", 100), ("ddim", 100), ("sde", 200), ("midpoint", 25)):
        found[method] = measure.quality(diffusion, solver(method, steps), n=2000).energy_distance
    print(found, noise)
    assert max(found.values()) < 0.01
    assert max(found.values()) - min(found.values()) < 4 * noise


def test_too_much_guidance():
    """Variety is lost first, then samples leave the bounds of all data; w = 1 is best, w = 0 knows no class."""
    config = ToyConfig(width=128, depth=2, steps=600, learning_rate=4e-3, ema=0.99, conditional=True)
    trained = train(LAWS["gmm"], config, seed=0)
    found, samples = measure.guidance(trained, (0, 1, 2, 5, 8), solver=solver("euler", 20), n=128)
    assert len(samples) == 5 and samples[0].shape == (8, 128, 2)
    assert found.own_class[0] < 0.2 and found.own_class[1] > 0.9
    assert found.std[1] == pytest.approx(1, abs=0.12) and found.std[2] < 0.75
    assert found.out_of_bounds[1] < 0.02 < 0.2 < found.out_of_bounds[3]
    assert np.argmin(found.energy_distance) == 1 and (np.diff(found.energy_distance[1:]) > 0).all()


def test_ring_of_the_tutorial():
    """The plain network of [x, t], 5000 steps of 256: loss 1.01, energy distance of 50 Euler steps < 0.003."""
    trained = train(LAWS["ring"], ToyConfig(**TUTORIAL), seed=0)
    assert trained.losses[-500:].mean() == pytest.approx(1.01, abs=0.03)
    assert measure.quality(trained, solver("euler", 50)).energy_distance < 0.003


def test_ring_of_the_tutorial_by_noise_prediction():
    """The DDPM twin on 1000 linear steps: loss 0.19, energy distance < 0.006, fresh noise at every step."""
    trained = train(LAWS["ring"], ToyConfig(process="ddpm", **TUTORIAL), seed=0)
    assert trained.losses[-500:].mean() == pytest.approx(0.19, abs=0.02)
    assert measure.quality(trained, solver("ancestral", 1000), n=2000).energy_distance < 0.006


def test_informed_beats_plain_on_the_ring():
    """Ten Euler steps of the informed network after 400 steps: below the bar that 5000 plain ones miss."""
    trained = train(LAWS["ring"], ToyConfig(steps=400, width=128), seed=0)
    assert measure.quality(trained, solver("euler", 10)).energy_distance < 0.004


def test_meanflow_in_one_step():
    """One evaluation makes a sample: nearer to the data than one or two Euler steps of a perfect flow."""
    config = ToyConfig(process="meanflow", width=128, depth=2, steps=800, batch_size=512)
    trained = train(LAWS["ring"], config, seed=0)
    quality = measure.quality(trained, solver("euler", 1))
    assert quality.nfe == 1 and quality.energy_distance < 0.17  # Euler, 2 steps: 0.19
    with pytest.raises(ValueError, match="meanflow jumps"):
        trained.sample(jax.random.key(0), 10, solver("midpoint", 1))


def test_any_network_and_path_has_a_likelihood():
    """`velocity` is finite at both ends for every process, and one training is one seed, bit for bit."""
    for config in (
        ToyConfig(steps=3, batch_size=8, width=8),
        ToyConfig(steps=3, batch_size=8, path="cosine"),
        ToyConfig(steps=3, batch_size=8, process="ddpm", network="plain"),
        ToyConfig(steps=3, batch_size=8, process="ddpm", prediction="x1", path="ddpm_cosine"),
        ToyConfig(steps=3, batch_size=8, process="score", width=8),
        ToyConfig(steps=3, batch_size=8, process="meanflow", network="plain"),
    ):
        trained = train(LAWS["moons"], config, seed=1)
        v = trained.velocity(jnp.ones((3, 2)), jnp.array([0.0, 0.5, 1.0]))
        assert v.shape == (3, 2) and jnp.isfinite(v).all(), config
    again = train(LAWS["moons"], config, seed=1)
    np.testing.assert_array_equal(again.losses, trained.losses)
    assert (train(LAWS["moons"], config, seed=2).losses != trained.losses).all()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"process": "meanflow", "path": "vp"}, "meanflow has a path"),
        ({"prediction": "v"}, "is for --process ddpm"),
        ({"path": "ddpm_linear"}, "table of diffusion steps"),
        ({"steps": 0}, "at least 1"),
        ({"process": "score", "path": "cond_ot"}, "says nothing of the data"),
    ],
)
def test_what_does_not_fit_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ToyConfig(**values)
