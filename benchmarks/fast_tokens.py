"""FAST tokens of real data sets: tokens per chunk and reconstruction error, by scale and vocabulary.

python -m benchmarks.fast_tokens --tabletop data/tabletop --metaworld data/metaworld --json fast_tokens.json

Tokenizers are trained on the training episodes and measured on the held-out ones. Beside them one token per action
and dimension, in 256 equal bins between the training data's extremes (as RT-2 and OpenVLA have it).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.cli.command import cli, run
from vla_jax.cli.config_file import load_config
from vla_jax.data.bundle import prepare
from vla_jax.data.config import DataConfig
from vla_jax.data.fast.dataset import draw_chunks, report
from vla_jax.data.fast.train import train_fast
from vla_jax.data.index import index_dataset, split_episodes
from vla_jax.data.sources.source import EpisodeSource

SETTINGS = ((5.0, 1024), (10.0, 512), (10.0, 1024), (10.0, 2048), (20.0, 1024))
"""Scale and vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Data sets, and where to write."""

    tabletop: Path | None = None
    """A data set of the tabletop."""
    metaworld: Path | None = None
    """A data set of MetaWorld."""
    chunks: int = 20_000
    """Chunks to train on, and at most as many to measure on."""
    json: Path | None = None
    """File for the numbers."""


def measure(path: Path, config: DataConfig, horizon: int, count: int) -> list[dict[str, Any]]:
    """A row per setting, on the held-out chunks of a data set; the last one is of bins."""
    config = dataclasses.replace(config, path=str(path), task_weights=())
    normalize = prepare(config).normalize
    source = EpisodeSource(path)
    train, held_out = split_episodes(index_dataset(source), config)
    seen = draw_chunks(source, train, normalize, horizon, count)
    unseen = draw_chunks(source, held_out, normalize, horizon, count)
    rows = []
    for scale, vocab_size in SETTINGS:
        try:
            fast = train_fast(seen, vocab_size=vocab_size, scale=scale)
        except ValueError as error:
            print(f"{path}, scale {scale:g}, vocabulary {vocab_size}: {error}")
            continue
        rows.append({"method": "FAST"} | report(fast, unseen))
    return [*rows, bins(seen, unseen)]


def bins(seen: np.ndarray, unseen: np.ndarray, number: int = 256) -> dict[str, Any]:
    """One token per action and dimension."""
    low, high = seen.min(axis=(0, 1)), seen.max(axis=(0, 1))
    width = np.where(high > low, (high - low) / number, 1)
    index = np.clip(np.floor((unseen - low) / width), 0, number - 1)
    error = low + (index + 0.5) * width - unseen
    error = np.where(high > low, error, low - unseen)
    size = float(unseen.shape[1] * unseen.shape[2])
    return {
        "method": "256 bins",
        "chunks": len(unseen),
        "vocab_size": number,
        "tokens_mean": size,
        "tokens_p99": size,
        "actions_per_token": 1.0,
        "rmse": float(np.sqrt(np.mean(error**2))),
        "max_error": float(np.abs(error).max()),
    }


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"| {name} | vocabulary | scale | tokens per chunk | 99 % | actions per token | error, RMS | largest |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        scale = f"{row['scale']:g}" if "scale" in row else "–"
        lines.append(
            f"| {row['method']} | {row['vocab_size']} | {scale} | {row['tokens_mean']:.1f} | {row['tokens_p99']:.0f} "
            f"| {row['actions_per_token']:.2f} | {row['rmse']:.4f} | {row['max_error']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures the data sets that are given."""
    args = cli(Args, description=__doc__)
    found = {}
    for name, path in (("tabletop", args.tabletop), ("metaworld", args.metaworld)):
        if path is None:
            continue
        config = load_config("configs/tabletop.py" if name == "tabletop" else "configs/metaworld_mt3.py")
        found[name] = measure(path, config.data, config.model.expert.horizon, args.chunks)
        print(f"{name}: {found[name][0]['chunks']} held-out chunks\n{table(name, found[name])}\n")
    if not found:
        raise ValueError("give --tabletop DIR, --metaworld DIR, or both")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
