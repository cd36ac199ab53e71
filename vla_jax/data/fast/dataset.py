"""A FAST tokenizer for a data set, and what it does to the data set's chunks."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vla_jax.data.derived import cached
from vla_jax.data.fast.codec import FastTokenizer
from vla_jax.data.fast.config import FastConfig
from vla_jax.data.fast.train import train_fast
from vla_jax.data.normalize import Normalize
from vla_jax.data.robot_units import RobotUnits
from vla_jax.data.sample import Sample
from vla_jax.data.sources.source import EpisodeSource

_VERSION = 1


class Prepared(NamedTuple):
    """A tokenizer, and the most tokens that any chunk of the data set takes."""

    fast: FastTokenizer
    longest: int


def normalized_chunks(
    source: EpisodeSource,
    episodes: Sequence[int] | Int[np.ndarray, " n"],
    normalize: Normalize,
    horizon: int,
    units: RobotUnits | None = None,
) -> Iterator[Float[np.ndarray, "steps k a"]]:
    """The chunk from every step on, an array per episode; behind the end the last action is repeated."""
    for number in episodes:
        episode = source.read(int(number))
        steps = np.arange(len(episode))
        wanted = np.minimum(steps[:, None] + np.arange(horizon), len(episode) - 1)
        sample = Sample(
            images={},
            state=episode.state,
            instruction=episode.language_instruction,
            task=episode.metadata["task"],
            actions=episode.action[wanted],
        )
        yield normalize.inputs(sample if units is None else units.inputs(sample)).chunk


def prepare_fast(
    config: FastConfig,
    source: EpisodeSource,
    train: Sequence[int] | Int[np.ndarray, " n"],
    normalize: Normalize,
    horizon: int,
    fingerprint: str,
    units: RobotUnits | None = None,
) -> Prepared:
    """The tokenizer that a configuration asks for; what is trained or counted is kept beside the data set."""
    given = FastTokenizer.load(config.path) if config.path else None

    def compute() -> dict[str, Any]:
        fast = given
        if fast is None:
            chunks = draw_chunks(source, train, normalize, horizon, config.chunks, units)
            fast = train_fast(chunks, vocab_size=config.vocab_size, scale=config.scale)
        longest = 0
        if not config.max_tokens:
            everything = normalized_chunks(source, range(len(source)), normalize, horizon, units)
            longest = max(len(tokens) for chunks in everything for tokens in fast.encode(chunks))
        return {"files": fast.to_files(), "longest": longest}

    key = {
        "data": fingerprint,
        "train": [int(number) for number in train],
        "normalization": [normalize.method, normalize.group, *(["floor"] if normalize.floor else [])],
        "horizon": horizon,
        "count": not config.max_tokens,
        "fast": given.to_files() if given else [config.vocab_size, config.scale, config.chunks],
        "version": _VERSION,
        **({} if units is None else {"robot": units.robot.to_json()}),
    }
    value = cached(source.path, "fast", json.loads(json.dumps(key)), compute)
    return Prepared(FastTokenizer.from_files(value["files"]), value["longest"])


def draw_chunks(
    source: EpisodeSource,
    episodes: Sequence[int] | Int[np.ndarray, " e"],
    normalize: Normalize,
    horizon: int,
    count: int,
    units: RobotUnits | None = None,
) -> Float[np.ndarray, "n k a"]:
    """At most `count` chunks, from as many of the episodes as it takes, always the same ones."""
    order = np.random.default_rng(0).permutation(np.asarray(episodes))
    found, total = [], 0
    for chunks in normalized_chunks(source, order, normalize, horizon, units):
        found.append(chunks)
        total += len(chunks)
        if total >= count:
            break
    return np.concatenate(found)[:count]


def report(fast: FastTokenizer, chunks: Float[np.ndarray, "n k a"]) -> dict[str, Any]:
    """What the tokenizer costs and loses on normalised chunks."""
    tokens = fast.encode(chunks)
    _, k, a = chunks.shape
    decoded = np.stack([fast.decode(ids, k, a).actions for ids in tokens])
    lengths, error = np.asarray([len(ids) for ids in tokens]), decoded - chunks
    return {
        "chunks": len(chunks),
        "horizon": k,
        "action_dim": a,
        "vocab_size": fast.vocab_size,
        "scale": fast.scale,
        "tokens_mean": float(lengths.mean()),
        "tokens_p50": float(np.median(lengths)),
        "tokens_p99": float(np.quantile(lengths, 0.99)),
        "tokens_max": int(lengths.max()),
        "actions_per_token": k * a / float(lengths.mean()),
        "rmse": float(np.sqrt(np.mean(error**2))),
        "rmse_per_dim": [float(x) for x in np.sqrt(np.mean(error**2, axis=(0, 1)))],
        "max_error": float(np.abs(error).max()),
        "clipped_share": fast.clipped(chunks),
    }
