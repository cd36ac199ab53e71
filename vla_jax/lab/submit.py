"""Job scripts for models that are too large to be trained side by side: one job per cell."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vla_jax.lab.grid import Cell

Scheduler = Literal["slurm", "xpk"]

DROPPED = {"--submit": 1, "--submit-args": 1, "--dry-run": 0, "--group": 1, "--max-memory": 1}
"""Options of the submitting command that its jobs do not get, and how many values they take."""

SLURM = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --output={folder}/%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
{extra}
cells=(
{cells}
)
exec srun {command} --cell "${{cells[$SLURM_ARRAY_TASK_ID]}}"
"""


def write_jobs(
    scheduler: Scheduler,
    cells: Sequence[Cell],
    program: Sequence[str],
    argv: Sequence[str],
    out: Path,
    extra: str,
) -> tuple[Path, list[str]]:
    """Writes the script; returns it and the command that submits it.

    **Arguments:**

    - `program`: the words that start a sweep, without options, e.g. ``python -m launch.sweep``.
    - `argv`: the options of the submitting command; every job runs it for one cell. A job that is started again
      goes on where it stopped.
    - `extra`: further options of sbatch or of ``xpk workload create`` (there: cluster and device type).
    """
    folder = out / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join([*program, *own_options(argv), "--group", "1"])
    if scheduler == "slurm":
        script = folder / "sweep.sbatch"
        options = "\n".join(f"#SBATCH {option}" for option in shlex.split(extra))
        names = "\n".join(f"  {shlex.quote(cell.name)}" for cell in cells)
        text = SLURM.format(
            name=_slug(out.name),
            last=len(cells) - 1,
            folder=folder,
            extra=options,
            cells=names,
            command=command,
        )
        script.write_text(text.replace("\n\n", "\n"))
        return script, ["sbatch", str(script)]
    script = folder / "sweep.sh"
    lines = ["#!/bin/bash", "set -e"]
    for number, cell in enumerate(cells):
        one = f"{command} --cell {shlex.quote(cell.name)}"
        workload = f"{_slug(out.name)[:30]}-{number}"
        options = f" {extra}" if extra else ""
        lines.append(f"xpk workload create --workload {workload} --command {shlex.quote(one)}{options}")
    script.write_text("\n".join(lines) + "\n")
    return script, ["bash", str(script)]


def submit(command: Sequence[str], needed: str) -> None:
    """Runs the submitting command; raises ValueError where the scheduler is not here or refuses."""
    if shutil.which(needed) is None:
        raise ValueError(f"{needed} is not on this machine; --dry-run only writes the scripts")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"{shlex.join(command)} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}"
        )
    print(done.stdout, end="")


def own_options(argv: Sequence[str]) -> list[str]:
    """The options that a job gets as well."""
    kept, skip = [], 0
    for arg in argv:
        name, equals, _ = arg.replace("_", "-").partition("=")
        if skip:
            skip -= 1
        elif name in DROPPED:
            skip = 0 if equals else DROPPED[name]
        else:
            kept.append(arg)
    return kept


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "sweep"
