"""A model of a few matrices, a process without noise and a batch with ragged masks: steps that compile in no time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.config import TrainConfig
from vla_jax.flow.base import Corrupted
from vla_jax.flow.processes import Flow
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.train.config import LoopConfig, OptimConfig
from vla_jax.types import Batch, Context

WIDTH, VOCAB, DIM, HORIZON, LENGTH = 8, 11, 3, 4, 6


class Toy:
    """Token features; their masked mean is all that the expert sees, as two features: keys and values."""

    def apply(self, variables, *args, method):
        return getattr(self, method)(variables["params"], *args)

    def prefill(self, p, batch, visible):
        hidden = jnp.tanh(p["backbone"]["embed"][batch.tokens] @ p["backbone"]["mix"])
        total = jnp.sum(jnp.where(batch.token_mask[..., None], hidden, 0), axis=1)
        seen = total / jnp.maximum(jnp.sum(batch.token_mask, axis=1), 1)[:, None]
        features = jnp.stack([seen @ p["backbone"]["key"], seen @ p["backbone"]["value"]], axis=1)
        everywhere = jnp.ones(features.shape[:2], bool)
        positions = jnp.zeros(features.shape[:2], jnp.int32)
        context = Context(features=features, mask=everywhere, visible=everywhere, positions=positions)
        return context, hidden

    def output_table(self, p):
        return p["backbone"]["embed"]

    def denoise(self, p, context, given, x_t, t):
        keys, values = context.features[:, 0], context.features[:, 1]
        seen = jnp.tanh(keys + given.state @ p["expert"]["state"]) * values
        return x_t @ p["expert"]["x"] + (seen @ p["expert"]["out"])[:, None] + t[:, None, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process(Flow):
    """Noise and times that are a function of the sample, so that a sample's loss does not depend on its place."""

    def corrupt(self, key, a):
        noise, t = jnp.cos(7 * a), jnp.abs(jnp.sin(a[:, 0, 0]))
        at = t[:, None, None]
        return Corrupted((1 - at) * noise + at * a, t, a - noise, noise)

    def loss(self, prediction, target):
        return (prediction - target) ** 2


def batch_of(b=4, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    prompt, target = rng.integers(1, 3, b), rng.integers(1, 4, b)
    index = np.arange(LENGTH)[None]
    loss = (index >= prompt[:, None]) & (index < (prompt + target)[:, None])
    steps = rng.integers(1, HORIZON + 1, b)[:, None]
    action_mask = np.broadcast_to((np.arange(HORIZON) < steps)[..., None], (b, HORIZON, DIM))
    batch = Batch(
        images={"top": np.zeros((b, 2, 2, 3), np.uint8)},
        image_mask={"top": np.ones(b, bool)},
        state=rng.normal(size=(b, 2)).astype(np.float32),
        tokens=rng.integers(0, VOCAB, (b, LENGTH)).astype(np.int32),
        token_mask=index < (prompt + target)[:, None],
        token_causal=loss,
        token_loss=loss,
        actions=rng.normal(size=(b, HORIZON, DIM)).astype(np.float32),
        action_mask=action_mask.copy(),
    )
    return jax.tree.map(jnp.asarray, batch)


def params_of(seed=1):
    rng = np.random.default_rng(seed)
    shapes = {
        "backbone": {"embed": (VOCAB, WIDTH), "mix": (WIDTH, WIDTH), "key": (WIDTH, 5), "value": (WIDTH, 5)},
        "expert": {"state": (2, 5), "x": (DIM, DIM), "out": (5, DIM)},
    }
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s) * 0.5, jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def config(objective: ObjectiveConfig, *, accumulate=1, clip="per_group", steps=4) -> TrainConfig:
    return TrainConfig(
        objective=objective,
        optim=OptimConfig(learning_rate=1e-2, clip=clip, warmup_fraction=0.0),
        train=LoopConfig(batch_size=48, steps=steps, accumulate=accumulate, ema_decay=None, log_every=1),
    )
