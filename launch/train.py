"""Trains a policy. Running the same command again continues where it stopped.

python -m launch.train --config configs/tabletop.py --run-dir runs/tabletop

python -m launch.train --config configs/tabletop.py --run-dir runs/x --train.batch_size 32 --mesh.fsdp 2

python -m launch.train --config configs/tabletop.py --run-dir runs/x --dry-run

The run directory gets checkpoints, config.json, metrics.jsonl (losses; the same bytes however often the run was
interrupted), perf.jsonl (timings) and TensorBoard events. Ctrl-C or SIGTERM saves and stops.
"""

import dataclasses
from pathlib import Path

from launch._main import cli_with_config, run


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """What is not part of the experiment."""

    run_dir: Path
    """Directory of the run: created, or continued."""
    dry_run: bool = False
    """Only print the configuration, and where every array would lie on the devices."""


def main() -> None:
    """Parses the command line and trains."""
    args, config = cli_with_config(TrainArgs, description=__doc__)
    from vla_jax.train.run import train  # after parsing: --help need not wait for JAX

    train(config, args.run_dir, dry_run=args.dry_run)


if __name__ == "__main__":
    run(main)
