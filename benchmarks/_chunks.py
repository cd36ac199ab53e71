"""Action chunks by flow and by diffusion: a way of 32 steps around an obstacle, on either side.

The observation is where the robot is; the chunk the 16 next places. From the start both sides are right. What is
measured: rms jerk (third difference) of a chunk; the jump between a chunk's plan for its step 9 and the first step of
the next chunk, asked from step 8, with fresh noise and with the same; how often a chunk from the start hits the
obstacle; how often it takes the side less taken; whether the same noise (and another key) gives the same chunk.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from vla_jax.flow.config import ProcessConfig, SolverConfig
from vla_jax.flow.diffusion import Diffusion
from vla_jax.flow.processes import Flow, make_process

WAY, CHUNK, EXECUTED, N = 32, 16, 8, 2000
HEADS = {
    "flow": make_process(ProcessConfig(time="uniform", t_max=1.0)),
    "ddpm": make_process(
        ProcessConfig(
            kind="ddpm", path="ddpm_cosine", diffusion_steps=100, clip=1.5, time="uniform", t_max=1.0
        )
    ),
}
SAMPLERS = [
    *(("flow Euler", "flow", "euler", n) for n in (2, 5, 10, 20)),
    *(("DDIM", "ddpm", "ddim", n) for n in (2, 5, 10, 20)),
    *(("DDPM ancestral", "ddpm", "ancestral", n) for n in (10, 20, 100)),
]


def places(height: Float[Array, " b"], step: Float[Array, "b k"]) -> Float[Array, "b k 2"]:
    """Along half a sine of this height; both axes have about unit size."""
    u = step / WAY
    return jnp.stack([2 * u - 1, 2 * height[:, None] * jnp.sin(jnp.pi * u)], axis=-1)


def demonstrations(key: Key[Array, ""], n: int) -> tuple[Float[Array, "n 2"], Float[Array, "n k 2"]]:
    """(observation, chunk) at random steps of random demonstrations."""
    side, height, step, noise = jax.random.split(key, 4)
    height = jax.random.rademacher(side, (n,)) * (0.5 + 0.05 * jax.random.normal(height, (n,)))
    first = jax.random.randint(step, (n, 1), 0, WAY - CHUNK + 1)
    way = places(height, first + jnp.arange(CHUNK + 1))
    return way[:, 0] + 0.02 * jax.random.normal(noise, (n, 2)), way[:, 1:]


class Head(nn.Module):
    """``[chunk, t, observation]`` through two layers of 256."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b k 2"], t: Float[Array, " b"], observed: Float[Array, "b 2"]
    ) -> Float[Array, "b k 2"]:
        """Velocity or noise."""
        h = jnp.concatenate([x.reshape(x.shape[0], -1), t[:, None], observed], axis=1)
        for _ in range(2):
            h = nn.silu(nn.Dense(256)(h))
        return nn.Dense(CHUNK * 2)(h).reshape(x.shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(process: Flow | Diffusion, steps: int, key: Key[Array, ""]) -> Any:
    """Parameters after `steps` batches of 128."""
    params = Head().init(key, jnp.zeros((1, CHUNK, 2)), jnp.zeros(1), jnp.zeros((1, 2)))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def loss(params, key):
        for_data, for_noise = jax.random.split(key)
        observed, chunk = demonstrations(for_data, 128)
        c = process.corrupt(for_noise, chunk)
        return process.loss(Head().apply(params, c.x_t, c.t, observed), c.target).mean()

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]


def rms_jerk(chunk: Float[Array, "b k 2"]) -> Float[Array, ""]:
    """Root mean square third difference."""
    return jnp.sqrt(jnp.square(jnp.diff(chunk, n=3, axis=1)).sum(-1).mean())


def jump(plan: Float[Array, "b k 2"], following: Float[Array, "b k 2"]) -> Float[Array, ""]:
    """Distance between what two chunks say of the same step, root mean square."""
    return jnp.sqrt(jnp.square(following[:, 0] - plan[:, EXECUTED]).sum(-1).mean())


def from_start(chunk: Float[Array, "b k 2"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(share that ends in the obstacle, share on the side less taken); the way is 1 away from the middle there."""
    y = chunk[:, -1, 1]
    left = (y > 0).mean()
    return (jnp.abs(y) < 0.5).mean(), jnp.minimum(left, 1 - left)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def measure(
    process: Flow | Diffusion, method: str, steps: int, params: Any, key: Key[Array, ""]
) -> dict[str, Array]:
    """All of the module's numbers for one sampler."""
    draw, again, *keys = jax.random.split(key, 5)
    shape, solver = (N, CHUNK, 2), SolverConfig(method=method, num_steps=steps)

    def sample(key, observed, noise):
        return process.sample(
            lambda x, t: Head().apply(params, x, t, observed), key, shape, solver, noise=noise
        ).x

    noise, fresh = jax.random.normal(draw, shape), jax.random.normal(again, shape)
    start = places(jnp.zeros(N), jnp.zeros((N, 1)))[:, 0]
    plan = sample(keys[0], start, noise)
    here = plan[:, EXECUTED - 1]
    off, minority = from_start(plan)
    return {
        "jerk": rms_jerk(plan),
        "jump_fresh": jump(plan, sample(keys[1], here, fresh)),
        "jump_same": jump(plan, sample(keys[1], here, noise)),
        "off": off,
        "minority": minority,
        "reproducible": (sample(keys[2], start, noise) == plan).all().astype(jnp.float32),
    }


def take_detours(seed: int, steps: int) -> dict[str, dict[str, float]]:
    """{sampler and steps: numbers}, and those of the data itself."""
    key = jax.random.key(seed)
    trained = {name: train(process, steps, key) for name, process in HEADS.items()}
    height = 0.5 * jax.random.rademacher(key, (N,)) + 0.05 * jax.random.normal(key, (N,))
    way = places(height, jnp.arange(1.0, CHUNK + 1) * jnp.ones((N, 1)))
    off, minority = from_start(way)
    data = {"jerk": rms_jerk(way), "off": off, "minority": minority}
    nothing = {"nfe": 0, "jump_fresh": 0, "jump_same": 0, "reproducible": 1}
    rows = {"the data": nothing | {k: float(v) for k, v in data.items()}}
    for name, head, method, n in SAMPLERS:
        made = measure(HEADS[head], method, n, trained[head], jax.random.fold_in(key, 1))
        rows[f"{name} {n}"] = {"nfe": n} | {k: float(v) for k, v in made.items()}
    return rows
