"""Our side of `peers`: trains the network, samples with it, prints JSON. Run by `benchmarks.peers`."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._peer_cases import (
    CASES,
    LIKELIHOOD_STEPS,
    OBSERVED,
    TABLE,
    TOLERANCE,
    WIDTH,
    A,
    Case,
    K,
    inputs,
    milliseconds,
)
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.couplings import exact_pairs
from vla_jax.flow.diffusion import Diffusion
from vla_jax.flow.likelihood import log_likelihood
from vla_jax.flow.processes import Flow
from vla_jax.flow.step_schedules import CosineSteps

DDIM = Diffusion(schedule=CosineSteps(TABLE), prediction="x1")


def encode(params, observed):
    """What does not change over the steps."""
    return observed @ params["observed"] + params["bias0"]


def velocity(params, encoded, x, t):
    """Three hidden layers of SiLU; the first sees chunk, time and encoded observation."""
    h = jax.nn.silu(x.reshape(x.shape[0], -1) @ params["chunk"] + encoded + t[:, None] * params["time"])
    for i in (1, 2):
        h = jax.nn.silu(h @ params[f"kernel{i}"] + params[f"bias{i}"])
    return (h @ params["out"] + params["bias3"]).reshape(x.shape)


def train(path: str) -> dict:
    """400 steps on chunks that wander from a place the observation names."""
    rng = np.random.default_rng(0)
    shapes = {
        "chunk": (K * A, WIDTH), "observed": (OBSERVED, WIDTH), "time": (1, WIDTH),
        "kernel1": (WIDTH, WIDTH), "kernel2": (WIDTH, WIDTH), "out": (WIDTH, K * A),
    }  # fmt: skip
    params = {k: (rng.normal(size=s) / np.sqrt(s[0])).astype(np.float32) for k, s in shapes.items()}
    params |= {f"bias{i}": np.zeros(WIDTH if i < 3 else K * A, np.float32) for i in range(4)}
    place = (rng.normal(size=(OBSERVED, A)) / np.sqrt(OBSERVED)).astype(np.float32)
    process, optimizer = Flow(), optax.adam(1e-3)

    def loss(params, key):
        for_data, for_walk, for_noise = jax.random.split(key, 3)
        observed = jax.random.normal(for_data, (128, OBSERVED))
        walk = jnp.cumsum(jax.random.normal(for_walk, (128, K, A)), axis=1) / 4
        c = process.corrupt(for_noise, (observed @ place)[:, None] + walk)
        return process.loss(velocity(params, encode(params, observed), c.x_t, c.t), c.target).mean()

    @jax.jit
    def run(params):
        def step(carry, key):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(0), 400)
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, losses

    params, losses = jax.device_get(run(params))
    np.savez(path, **params)
    return {"first_loss": float(losses[:20].mean()), "last_loss": float(losses[-20:].mean())}


@functools.partial(jax.jit, static_argnums=0)
def sample(case: Case, params, noise, observed):
    """(chunks, evaluations)."""
    encoded = encode(params, observed)
    field = functools.partial(velocity, params, encoded)
    solver = SolverConfig(method=case.method, num_steps=case.steps or 10, rtol=TOLERANCE, atol=TOLERANCE)
    process = DDIM if case.method == "ddim" else Flow()
    made = process.sample(field, jax.random.key(0), noise.shape, solver, noise=noise)
    return made.x, made.nfe


@jax.jit
def log_prob(params, x, observed):
    """Exact, midpoint."""
    field = functools.partial(velocity, params, encode(params, observed))
    return log_likelihood(field, x, SolverConfig(method="midpoint", num_steps=LIKELIHOOD_STEPS)).log_prob


def measure(weights: str, repeats: int, out: str) -> dict:
    """Times, evaluations, samples, likelihood of chunks, couplings."""
    params = {k: jnp.asarray(v) for k, v in np.load(weights).items()}
    ms, nfe, samples = {}, {}, {}
    for case in CASES:
        noise, observed = map(jnp.asarray, inputs(case.batch))
        made, count = sample(case, params, noise, observed)
        samples[case.key], nfe[case.key] = np.asarray(made), int(count)
        ms[case.key] = milliseconds(
            lambda: jax.block_until_ready(sample(case, params, noise, observed)), repeats
        )
    np.savez(out, **samples)
    chunks = log_prob(params, *map(jnp.asarray, inputs(4)))
    noise, data = inputs(256)[0], np.cumsum(inputs(257)[0][:256], axis=1) / 4
    pairs = exact_pairs(noise, data)
    return {
        "ms": ms,
        "nfe": nfe,
        "likelihood_of_chunks": f"{float(chunks.mean()):.4f} nats on average",
        "likelihood_of_vectors": f"{float(chunks.mean()):.4f}",
        "couplings": {"cost": float(np.square(noise[pairs] - data).sum())},
        "versions": {"jax": jax.__version__},
    }


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    print(json.dumps(train(*rest) if command == "train" else measure(rest[0], int(rest[1]), rest[2])))
