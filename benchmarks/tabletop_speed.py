"""Demonstrations of the tabletop per second: drawing a scene, driving the expert through it, and rendering its frames.

    python -m benchmarks.tabletop_speed

One process, as many cores as JAX takes. Unrendered: all but the pictures, on the device. Rendered: `generate`, which
is what `launch.collect` calls in each of its processes: both cameras at every step, on the host. Compilation and one
warm-up of every batch come first; the median of the rest is said.
"""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from vla_jax.cli.command import cli, run
from vla_jax.sim.tabletop import TabletopConfig, demos, generate
from vla_jax.sim.tabletop.episode import kind_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """How much to run."""

    episodes: int = 256
    """Of a batch of rendered ones."""
    unrendered: int = 4096
    """Of a batch of unrendered ones."""
    batches: int = 8
    """Timed batches of each kind."""
    json: Path | None = None
    """File for the numbers."""


def main() -> None:
    """Measures, prints a line of each kind, writes."""
    args, config = cli(Args, description=__doc__), TabletopConfig()
    fractions = (config.swapped_fraction, config.scattered_fraction)

    def drive(seeds: np.ndarray) -> int:
        jax.block_until_ready(demos._rollouts(config, seeds, kind_weights(config, None), *fractions))
        return 0

    def render(seeds: np.ndarray) -> int:
        return int(generate(config, seeds).lengths.sum())

    found = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "unrendered": measure(drive, args.unrendered, args.batches),
        "rendered": measure(render, args.episodes, args.batches),
    }
    for name in ("unrendered", "rendered"):
        said = ", ".join(f"{value:,.0f} {key.replace('_', ' ')}" for key, value in found[name].items())
        print(f"{name}: {said}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(job: Callable[[np.ndarray], int], size: int, batches: int) -> dict[str, float]:
    """Episodes per second, and frames where the job counts them; every batch has other scenes."""
    seeds = np.arange(size * batches, dtype=np.uint32).reshape(batches, size)
    for batch in seeds:  # numbers of frames differ, and with them the programs
        job(batch)
    taken, frames = [], []
    for batch in seeds:
        start = time.perf_counter()
        frames.append(job(batch))
        taken.append(time.perf_counter() - start)
    found = {"episodes_per_second": size / float(np.median(taken))}
    if any(frames):
        found["frames_per_second"] = float(np.median(np.asarray(frames) / taken))
    return found


if __name__ == "__main__":
    run(main)
