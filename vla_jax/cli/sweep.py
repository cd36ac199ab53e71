"""Trains many models that differ in a few values, in as few programs as possible, and judges each of them.

python -m launch.sweep --config configs/lambda_study.py --out runs/study --seeds 3 \\
    --grid objective.action_weight=0,0.1,1,10 --grid objective.insulation=0,1

Cells that differ only in weights of losses (above 0), objective.insulation, optim.learning_rate and the seed are
trained side by side in one program, on the same batches in the same order; other fields, and λ = 0, make further
programs. Killed at any moment, the same command goes on where it stopped. `python -m launch.report --sweep OUT` makes
tables and figures.
"""

import dataclasses
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vla_jax.cli.command import UsageError, cli_with_config, typed
from vla_jax.config import TrainConfig
from vla_jax.finite import finite


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class SweepArgs:
    """What is varied, and how."""

    out: Path
    """Directory of the sweep: created, or continued. Several sweeps may share it."""
    grid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """FIELD=VALUE,VALUE,… of any field of the configuration; may be given several times."""
    seeds: int = 1
    """How many seeds, from the configuration's own on."""
    group: int | None = None
    """Most cells in one program; 1: one after another, each as launch.train does it. None: all that can be."""
    max_memory: float | None = None
    """GiB that a program may need on each device, by the compiler's account: limits the groups."""
    episodes: int = 64
    """Held-out tabletop episodes per cell, as many again with swapped instructions; 0: losses only."""
    keep_policies: bool = False
    """Keep every cell's parameters as a checkpoint in its directory, for launch.evaluate."""
    cell: str | None = None
    """Train this one cell of the sweep only, as the jobs of --submit do."""
    submit: Literal["slurm", "xpk"] | None = None
    """Write one job per cell and submit them, in place of training here."""
    submit_args: str = ""
    """Further options for sbatch, or for xpk workload create, as one string."""
    dry_run: bool = False
    """Only list the programs and their cells; with --submit only write the scripts."""


def main() -> None:
    """Parses the command line and sweeps."""
    args, base = cli_with_config(SweepArgs, description=__doc__)
    if re.match(r"[a-z0-9]+:/", str(args.out)):
        raise UsageError(
            f"--out {args.out}: sweeps are kept in a folder that all hosts share, not in an object store"
        )
    if args.cell is None:
        return _sweep(args, base)
    from vla_jax.sharding import distributed  # a job's processes are one run, as those of launch.train

    distributed.initialize()
    _sweep(args, base)
    distributed.shutdown()


def _sweep(args: SweepArgs, base: TrainConfig) -> None:
    from vla_jax.lab.grid import make_cells  # after parsing: --help need not wait for JAX
    from vla_jax.lab.plan import plan, split
    from vla_jax.lab.run import SweepConfig, check, record, sweep
    from vla_jax.lab.store import Store
    from vla_jax.lab.submit import submit, write_jobs
    from vla_jax.lab.train import Interrupted

    cells = make_cells(base, args.grid, args.seeds)
    options = ("group", "max_memory", "episodes", "keep_policies")
    config = SweepConfig(**{name: getattr(args, name) for name in options})
    asked = {"command": shlex.join([*typed("sweep"), *sys.argv[1:]])}
    check(cells)
    if args.submit:
        script, command = write_jobs(
            args.submit, cells, typed("sweep"), sys.argv[1:], args.out, args.submit_args
        )
        print(f"wrote {script} for {len(cells)} cells; {shlex.join(command)}")
        if not args.dry_run:
            record(cells, Store(args.out), asked)
            submit(command, {"slurm": "sbatch", "xpk": "xpk"}[args.submit])
        return
    if args.dry_run:
        for program in plan(cells):
            for group in split(program, config.group or len(program.cells)):
                print(f"{len(group.cells)} cells: {' '.join(cell.name for cell in group.cells)}")
        return
    try:
        sweep(cells, Store(args.out), config, asked, only=args.cell)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
