"""How good a toy model is, against what is known exactly.

| measure         | is                                                                                    |
|-----------------|---------------------------------------------------------------------------------------|
| nll             | - mean log p of fresh data under the learned flow, nats; at best the entropy           |
| in_support      | share of samples where the data are: exact density no less than 99 % of data have      |
| energy_distance | between samples and fresh data; 0 in the mean for a perfect model                      |
| nfe             | evaluations of the network for one sample                                              |
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vla_jax.flow.config import SolverConfig
from vla_jax.flow.diffusion import Diffusion
from vla_jax.flow.likelihood import log_likelihood
from vla_jax.flow.meanflow import MeanFlow
from vla_jax.flow.metrics import energy_distance
from vla_jax.flow.predictions import Kind
from vla_jax.toy.laws import Law, field
from vla_jax.toy.train import LAST_TIME, Trained


class Quality(NamedTuple):
    """Samples of one solver."""

    in_support: float
    energy_distance: float
    nfe: int


class TimeError(NamedTuple):
    """Mean squares over both axes, per time."""

    t: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]
    """Training loss."""
    floor: Float[np.ndarray, " n"]
    """The same of a perfect network."""
    error: Float[np.ndarray, " n"]
    """Between the network and a perfect one."""
    size: Float[np.ndarray, " n"]
    """Of what a perfect network answers."""


class Guidance(NamedTuple):
    """Samples of each class, guided with each scale w."""

    w: Float[np.ndarray, " n"]
    std: Float[np.ndarray, " n"]
    """Within a class, over that of the data."""
    out_of_bounds: Float[np.ndarray, " n"]
    """Share of samples beyond the range, per axis, of 99.9 % of all data."""
    energy_distance: Float[np.ndarray, " n"]
    """To data of the same class, mean over classes."""
    own_class: Float[np.ndarray, " n"]
    """Share of samples nearest to where their class is."""


def entropy(law: Law, n: int = 200_000) -> float:
    """Entropy of a law in nats, by sampling; standard error below 0.003."""
    return -float(jax.jit(law.log_prob)(law.sample(jax.random.key(1), n).x).mean())


def nll(trained: Trained, *, n: int = 2048, steps: int = 100, seed: int = 1000) -> float:
    """Exact divergence, rk4, on `n` fresh points; its standard error is about 0.006 for the checkerboard."""
    x = trained.law.sample(jax.random.key(seed), n).x
    solver = SolverConfig(method="rk4", num_steps=steps)
    return -float(jax.jit(lambda x: log_likelihood(trained.velocity, x, solver).log_prob)(x).mean())


@functools.lru_cache
def support_level(law: Law) -> float:
    """The log-density that 99 % of data have at least."""
    data = jax.jit(law.log_prob)(law.sample(jax.random.key(2), 100_000).x)
    return float(jnp.quantile(data, 0.01)) - 1e-5  # a constant density must not fail by rounding


def in_support(law: Law, x: Float[Array, "n 2"]) -> float:
    """Share of `x` where the exact density is at least what 99 % of data have."""
    return float((jax.jit(law.log_prob)(x) >= support_level(law)).mean())


def quality(trained: Trained, solver: SolverConfig, *, n: int = 5000, seed: int = 2000) -> Quality:
    """Of `n` samples against as many fresh data."""
    for_noise, for_data = jax.random.split(jax.random.key(seed))
    samples = jax.jit(lambda key: trained.sample(key, n, solver))(for_noise)
    data = trained.law.sample(for_data, n).x
    distance = jax.jit(energy_distance)(samples.x, data)
    return Quality(in_support(trained.law, samples.x), float(distance), int(samples.nfe))


def sampling_noise(law: Law, *, n: int = 5000, draws: int = 8) -> float:
    """Root mean square energy distance between two sets of `n` data points: what can't be told from 0."""
    keys = jax.random.split(jax.random.key(6), draws)
    distance = jax.jit(lambda key: energy_distance(*(law.sample(k, n).x for k in jax.random.split(key))))
    return float(np.sqrt(np.mean([float(distance(key)) ** 2 for key in keys])))


def time_error(
    trained: Trained, times: Float[np.ndarray, " m"], *, n: int = 2048, seed: int = 3000
) -> TimeError:
    """Loss and error at given times, on fresh data."""
    if isinstance(trained.process, MeanFlow):
        raise ValueError("the loss of meanflow is of an interval, not of a time")
    process = trained.process
    kind: Kind = process.prediction if isinstance(process, Diffusion) else "velocity"
    sign = -1 if kind == "score" else 1  # what is trained is sigma times the score: minus the noise
    perfect = field(trained.law, process.schedule, "eps" if kind == "score" else kind)
    x = trained.law.sample(jax.random.key(seed), n).x

    @jax.jit
    def at(t, key):
        example = process.corrupt(key, x, t=jnp.full(n, t))
        answer, best = trained.predict(example.x_t, example.t), sign * perfect(example.x_t, example.t)
        pairs = ((answer, example.target), (best, example.target), (answer, best), (best, 0.0))
        return jnp.stack([jnp.square(a - b).mean() for a, b in pairs])

    keys = jax.random.split(jax.random.key(seed + 1), len(times))
    rows = np.array([at(t, key) for t, key in zip(jnp.asarray(times, jnp.float32), keys)])
    return TimeError(np.asarray(times), *rows.T)


def guidance(
    trained: Trained,
    scales: tuple[float, ...] = (0, 1, 1.5, 2, 3, 5, 8),
    *,
    solver: SolverConfig | None = None,
    n: int = 256,
    seed: int = 4000,
) -> tuple[Guidance, list[Float[np.ndarray, "c n 2"]]]:
    """(measures, samples) of every scale: `n` samples of each class, the same noise for every scale."""
    law, solver = trained.law, solver or SolverConfig(num_steps=50)
    for_noise, for_data = jax.random.split(jax.random.key(seed))
    data, of = law.sample(for_data, 4 * n * law.classes)
    bounds = jnp.quantile(data, jnp.array([0.0005, 0.9995]), axis=0)
    label = jnp.repeat(jnp.arange(law.classes), n)
    groups = [data[of == c][: 2 * n] for c in range(law.classes)]
    centres = jnp.stack([g.mean(0) for g in groups])
    spread = jnp.mean(jnp.stack([g.std(0) for g in groups]))
    draw = jax.jit(lambda w: trained.sample(for_noise, len(label), solver, label=label, w=w).x)
    rows, pictures = [], []
    for w in scales:
        x = draw(jnp.float32(w))
        mine = x.reshape(law.classes, n, 2)
        outside = ((x < bounds[0]) | (x > bounds[1])).any(1)
        nearest = jnp.argmin(jnp.linalg.norm(x[:, None] - centres, axis=2), axis=1)
        distance = jnp.stack([energy_distance(m, g) for m, g in zip(mine, groups)])
        values = (mine.std(1).mean() / spread, outside.mean(), distance.mean(), (nearest == label).mean())
        rows.append([float(v) for v in values])
        pictures.append(np.asarray(mine))
    return Guidance(np.asarray(scales, float), *np.array(rows).T), pictures


def times_for_errors(count: int = 19) -> Float[np.ndarray, " m"]:
    """Evenly spaced, and a last one near data."""
    return np.append(np.linspace(0.05, 0.95, count), min(0.98, LAST_TIME))
