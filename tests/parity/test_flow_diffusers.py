"""Our DDPM and DDIM against diffusers' schedulers, with one field: samples to 1e-5 and posterior variances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from vla_jax.flow.config import SolverConfig
from vla_jax.flow.diffusion import Diffusion
from vla_jax.flow.step_schedules import CosineSteps, LinearSteps

STEPS = 100
TABLES = {
    "linear": (LinearSteps(STEPS), {"beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 0.2}),
    "cosine": (CosineSteps(STEPS), {"beta_schedule": "squaredcos_cap_v2"}),
}
KINDS = {"eps": "epsilon", "x1": "sample", "v": "v_prediction"}


@pytest.fixture(params=TABLES)
def table(request):
    return TABLES[request.param]


def answer(x, t):
    """Some smooth prediction; t = 0 is noise. On numpy, torch and jax arrays alike."""
    return 0.6 * x * (1 - 0.5 * t) + 0.1 * t


def test_tables(table):
    """alpha_bar, step i at t = 1 - (i + 1) / T."""
    schedule, options = table
    their = DDPMScheduler(num_train_timesteps=STEPS, **options)
    alpha = np.asarray(schedule.alpha(1 - (jnp.arange(STEPS) + 1) / STEPS))
    np.testing.assert_allclose(alpha**2, their.alphas_cumprod.numpy(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddim(table, kind, clip):
    """Ten steps of DDIM, eta 0, for every kind of prediction, with and without clipping: 1e-5."""
    schedule, options = table
    x = np.random.default_rng(0).normal(size=(4, 16, 7)).astype(np.float32)
    their = DDIMScheduler(
        num_train_timesteps=STEPS,
        prediction_type=KINDS[kind],
        clip_sample=clip is not None,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        **options,
    )
    their.set_timesteps(10)
    y = torch.from_numpy(x)
    for i in their.timesteps:
        prediction = answer(y, 1 - (int(i) + 1) / STEPS)
        # eps follows a clipped x1 only if asked: ours always does, so that the pair still makes x.
        y = their.step(prediction, i, y, use_clipped_model_output=clip is not None).prev_sample
    process = Diffusion(schedule=schedule, prediction=kind, clip=clip)
    field = lambda x, t: answer(x, t[:, None, None])  # noqa: E731
    solver = SolverConfig(method="ddim", num_steps=10)
    made = jax.jit(lambda x: process.sample(field, jax.random.key(0), x.shape, solver, noise=x).x)(x)
    np.testing.assert_allclose(made, y.numpy(), atol=1e-5 * max(1, np.abs(y.numpy()).max()))


def test_ancestral_moments(table):
    """Mean and variance of a DDPM step are those of DDIM with eta = 1, and of diffusers' DDPM."""
    schedule, options = table
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    ddpm = DDPMScheduler(num_train_timesteps=STEPS, clip_sample=False, **options)
    ddim = DDIMScheduler(num_train_timesteps=STEPS, clip_sample=False, timestep_spacing="trailing", **options)
    ddim.set_timesteps(STEPS)
    process = Diffusion(schedule=schedule, prediction="eps")
    key = jax.random.key(3)
    step = jax.jit(lambda x, t, s: process._ddim_step(lambda x, t: 0.3 * x, x, t, s, key, 1.0))
    z = np.asarray(jax.random.normal(key, x.shape))
    for i in (90, 50, 5):
        t, s = (jnp.full(4, 1 - (j + 1) / STEPS) for j in (i, i - 1))
        noise = torch.from_numpy(z.copy())
        y = torch.from_numpy(x)
        expected = ddim.step(0.3 * y, i, y, eta=1.0, variance_noise=noise).prev_sample
        np.testing.assert_allclose(step(x, t, s), expected, atol=1e-5 * max(1, expected.abs().max()))
        torch.manual_seed(0)
        drawn = ddpm.step(0.3 * y, i, y, generator=torch.Generator().manual_seed(0)).prev_sample
        their_noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        spread = float(ddpm._get_variance(i)) ** 0.5
        mean = drawn - spread * their_noise
        np.testing.assert_allclose(
            step(x, t, s), mean + spread * noise, atol=1e-5 * max(1, expected.abs().max()), err_msg=str(i)
        )
