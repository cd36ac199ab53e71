"""Makes tables and figures of one or several sweeps: report.html, which needs nothing else, PNGs, CSV and JSON.

python -m launch.report --sweep runs/lambda_study

python -m launch.report --sweep runs/lambda_study --out docs/figures --prefix lambda_
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from vla_jax.cli.command import cli


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """Which sweeps, and where to."""

    sweep: tuple[Path, ...]
    """Directories of launch.sweep; those of unfinished sweeps are shown as far as they are."""
    out: Path | None = None
    """Directory of the report; default: the first sweep's own, under report."""
    where: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """FIELD=VALUE: only the cells of which this holds; may be given several times."""
    prefix: str = ""
    """What the names of all files begin with."""


def main() -> None:
    """Parses the command line and writes."""
    args = cli(ReportArgs, description=__doc__)
    from vla_jax.lab.report import write_report  # after parsing: --help need not wait for JAX

    for path in write_report(
        args.sweep, args.out or args.sweep[0] / "report", prefix=args.prefix, conditions=args.where
    ):
        print(f"wrote {path}")
