"""Trains a policy. Running the same command again continues where it stopped.

python -m launch.train --config configs/tabletop.py --run-dir runs/tabletop

python -m launch.train --config configs/tabletop.py --run-dir runs/x --train.batch_size 32 --mesh.fsdp 2

python -m launch.train --config configs/tabletop.py --run-dir runs/x --dry-run

launch/local.sh 2 --config configs/tabletop.py --run-dir runs/x

python -m launch.train --config configs/tabletop.py --run-dir runs/y --init-from runs/x

The run directory gets checkpoints, config.json, metrics.jsonl (losses; the same bytes however often the run was
interrupted), perf.jsonl (timings), goodput.json (where the time went) and TensorBoard events. Ctrl-C or SIGTERM
saves and stops.

On several hosts the same command runs on each of them; Cloud TPU, GKE, SLURM and Open MPI are recognised, elsewhere
--coordinator, --num-processes and --process-id say who is who (docs/pods.md). Exit codes: 0 finished, or stopped
and saved; 2 an error that can be mended; 3 another process is gone or never came, start all of them again.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from vla_jax.cli.command import cli_with_config, value_of
from vla_jax.finite import finite

_BEGUN = time.monotonic()


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class TrainArgs:
    """What is not part of the experiment."""

    run_dir: str
    """Directory of the run: created, or continued. A local path or gs://…; all hosts share it."""
    init_from: str | None = None
    """Start from this run or these converted weights, with its model's sizes in place of the config file's; options
    of --model come after. Sets train.init_from and data.image_size, and the prompt where only it can hold the
    state. docs/fine_tuning.md"""
    dry_run: bool = False
    """Only print the configuration, where every array would lie on the devices, and of --init-from what would be new;
    refuses what the run would refuse."""
    extend: bool = False
    """Continue a run with a larger train.steps than it was begun with. From there on learning rate and λ follow the
    schedules of the new length: after a decay to the old end the learning rate rises again."""
    profile: str | None = None
    """START:STOP: trace these steps into RUN_DIR/profile, for TensorBoard or XProf."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where no cluster is recognised."""
    num_processes: int | None = None
    """How many processes the run has, where no cluster is recognised."""
    process_id: int | None = None
    """This process's number, from 0 on, where no cluster is recognised."""
    start_timeout: float = 300.0
    """Seconds to wait at the start until all processes are there, and again until each has loaded its libraries;
    then those that came end with code 3."""


def adapt(config: Any, argv: Sequence[str]) -> Any:
    """The config file's values with the model of --init-from."""
    path = value_of("--init-from", argv) or value_of("--init_from", argv)
    if path is None:
        return config
    from vla_jax.train.init_from import adapted

    return adapted(config, path)


def main() -> None:
    """Parses the command line and trains."""
    args, config = cli_with_config(TrainArgs, description=__doc__, adapt=adapt)
    from vla_jax.sharding import distributed  # after parsing: --help need not wait for JAX
    from vla_jax.train import profile

    steps = None if args.profile is None else profile.parse(args.profile)
    distributed.initialize(
        args.coordinator, args.num_processes, args.process_id, start_timeout=args.start_timeout
    )
    from vla_jax.train.run import train

    train(
        config,
        args.run_dir,
        dry_run=args.dry_run,
        extend=args.extend,
        profile=steps,
        begun=_BEGUN,
        start_timeout=args.start_timeout,
    )
    distributed.shutdown()
