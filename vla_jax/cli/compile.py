"""Compiles a training or sampling program for a TPU pod on a machine without one, and says what it will need.

python -m launch.compile --config configs/pi0_pretrain.py --topology v5e:16x16

python -m launch.compile --config configs/pi05_pretrain.py --topology v5e:16x16 --slices 2 --train.batch-size 4096

python -m launch.compile --config configs/pi0_pretrain.py --topology v5e:16x16 --search --json search.json

python -m launch.compile --config configs/pi0_pretrain.py --topology v5e:2x2 --program sample --train.batch-size 4

It prints memory per chip, collectives and a predicted step time; a program that does not fit ends in one line that
says by how much and what to change. Needs the extra `tpu` (libtpu), no TPU and no data set: `docs/compile.md`.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Literal

from vla_jax.cli.command import cli_with_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileArgs:
    """For which pod, and what to do with the result."""

    topology: str = "v5e:16x16"
    """Chip and sides of one slice: v5e:16x16, v5p:4x4x4, v6e:16x16, …"""
    slices: int = 1
    """Slices of that shape, joined by the data-centre network; mesh.data goes over them."""
    program: Literal["train", "sample"] = "train"
    """The training step, or a policy's chunk of actions (for train.batch_size observations)."""
    search: bool = False
    """Try mesh shapes × remat policies × microbatches for the training step, and rank those that fit."""
    compiles: int = 12
    """With --search: how many candidates to compile, the most promising ones first."""
    json: Path | None = None
    """File for the same as JSON."""
    hlo: Path | None = None
    """File for the compiled program's text."""

    def __post_init__(self):
        if self.compiles < 1:
            raise ValueError(f"compiles={self.compiles}: at least 1")
        if self.search and (self.program != "train" or self.hlo):
            raise ValueError("--search ranks training steps; it goes with neither --program sample nor --hlo")


def main() -> None:
    """Parses the command line, compiles, prints."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the TPU compiler must not look for a TPU
    args, config = cli_with_config(CompileArgs, description=__doc__)
    from vla_jax import aot  # after parsing: --help need not wait

    topology = aot.parse(args.topology, args.slices)
    if args.search:
        results = _search(config, topology, args)
    else:
        report = aot.measure(config, topology, args.program, text_to=args.hlo)
        print(report.text())
        results = report.json()
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _search(config, topology, args: CompileArgs) -> list:
    from vla_jax.aot import search

    def say(line: str) -> None:
        print(line, flush=True)

    topology.devices()  # no compiler, no search: one error instead of one for every mesh
    ranked = search.search(config, topology, compiles=args.compiles, say=say)
    print("\nbest first")
    for candidate, report in ranked:
        print(
            f"  MFU {report.mfu:.1%}  {report.samples_per_second_per_chip:.2f} samples/s/chip  "
            f"headroom {report.memory.headroom / 2**30:.2f} GiB  {search.options(candidate)}"
        )
    print(f"\n{ranked[0][1].text()}")
    return [report.json() | {"options": search.options(candidate)} for candidate, report in ranked]
