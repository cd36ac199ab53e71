"""Every full-size program that RESULTS.md has predictions for, compiled for its pod; and the table of them.

python -m benchmarks.pods                 # compiles what has no result yet: minutes each, several GiB of memory
python -m benchmarks.pods --only pi0_v5e  # those whose name starts so
python -m benchmarks.pods --table         # Markdown from the results that are there

Each case is one run of `launch.compile` in a process of its own, whose JSON goes to benchmarks/results/aot_<case>.json.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from vla_jax.cli.command import cli, run

RESULTS = Path("benchmarks/results")


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation."""

    config: str
    topology: str
    slices: int
    batch: int
    options: tuple[str, ...] = ()


DOTS = ("--model.remat", "dots_with_no_batch_dims_saveable", "--train.xla")
HALF, MOST = "xla_tpu_scoped_vmem_limit_kib=65536", "xla_tpu_scoped_vmem_limit_kib=98304"
"""Products may use half, or three quarters, of a chip's vector memory; by default far less."""

CASES = {
    "pi0_v5e_256": Case("pi0", "v5e:16x16", 1, 2048),
    "pi0_v5e_256_dots": Case("pi0", "v5e:16x16", 1, 1792, (*DOTS, HALF)),
    "pi05_v5e_256": Case("pi05", "v5e:16x16", 1, 2048),
    "pi0_v5p_64": Case("pi0", "v5p:4x4x4", 1, 2048),
    "pi05_v5p_64": Case("pi05", "v5p:4x4x4", 1, 2048),
    "pi0_v5p_64_dots": Case("pi0", "v5p:4x4x4", 1, 2048, (*DOTS, HALF)),
    "pi0_v6e_256": Case("pi0", "v6e:16x16", 1, 4096),
    "pi0_v6e_256_dots": Case("pi0", "v6e:16x16", 1, 3328, (*DOTS, MOST)),
    "pi05_v6e_256": Case("pi05", "v6e:16x16", 1, 4096),
    "pi0_v5e_2x256": Case("pi0", "v5e:16x16", 2, 4096),
    "pi05_v5e_2x256": Case("pi05", "v5e:16x16", 2, 4096),
    "pi0_v5e_16": Case("pi0", "v5e:4x4", 1, 128, ("--mesh.fsdp", "16")),
    "pi0_v5e_4x256": Case("pi0", "v5e:16x16", 4, 8192),
}
"""Name → what to compile. The weak scaling is pi0 on 16, 256 and 4 × 256 chips of v5e, 8 samples per chip."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PodsArgs:
    """What to do."""

    table: bool = False
    """Print the table of the results that are there, and compile nothing."""
    only: str = ""
    """Only cases whose name starts so."""
    again: bool = False
    """Also those that have a result."""
    minutes: float = 60.0
    """How long one compilation may take; what takes longer is reported and passed over."""


def main() -> None:
    """Compiles, or prints."""
    args = cli(PodsArgs, description=__doc__)
    chosen = {name: case for name, case in CASES.items() if name.startswith(args.only)}
    if not chosen:
        raise ValueError(f"only={args.only}: no case starts so; there are {', '.join(CASES)}")
    if args.table:
        print(table(chosen))
        return
    for name, case in chosen.items():
        if args.again or not result_of(name).exists():
            compile_case(name, case, args.minutes)
    print(table(chosen))


def result_of(name: str) -> Path:
    """Where a case's JSON lies."""
    return RESULTS / f"aot_{name}.json"


def command(name: str, case: Case) -> list[str]:
    """The command line of a case."""
    return [
        *(sys.executable, "-m", "launch.compile", "--config", f"configs/{case.config}_pretrain.py"),
        *("--topology", case.topology, "--slices", str(case.slices), "--train.batch-size", str(case.batch)),
        *("--json", str(result_of(name)), *case.options),
    ]


def compile_case(name: str, case: Case, minutes: float) -> None:
    """Runs one; one that fails, or takes too long, is reported and passed over."""
    print(f"== {name}", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(command(name, case), check=False, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        print(f"{name}: not compiled within {minutes:g} minutes", flush=True)


def table(cases: dict[str, Case]) -> str:
    """One line per case that has a result."""
    lines = [
        "| program | pod | mesh | batch | memory per chip | not sharded | step | samples/s/chip | MFU | limited by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        path = result_of(name)
        if not path.exists():
            continue
        r = json.loads(path.read_text())
        total = r["memory"]["limit"] - r["memory"]["headroom"]
        mesh = " × ".join(f"{axis}={size}" for axis, size in r["mesh"].items() if size > 1)
        pod = r["topology"] if r["slices"] == 1 else f"{r['slices']} × {r['topology']}"
        memory = f"{total / 2**30:.1f} of {r['memory']['limit'] / 2**30:.1f} GiB"
        lines.append(
            f"| {case.config} {r['program']}, {r['model']} | {pod} | {mesh} | {r['batch']} | {memory} | "
            f"{r['unsharded_share']:.2%} | {1e3 * r['step_seconds']:.0f} ms | "
            f"{r['samples_per_second_per_chip']:.2f} | {r['mfu']:.1%} | {r['limit']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
