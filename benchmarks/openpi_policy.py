"""Our compiled policy beside openpi's published inference: the same random weights, from numpy to numpy.

    python -m benchmarks.openpi_policy --size tiny
    python -m benchmarks.openpi_policy --size quarter                     # 200 M parameters, a few minutes on 2 cores
    python -m benchmarks.openpi_policy --size tiny --rewrites             # all rewrites, none, all but one
    python -m benchmarks.openpi_policy --size pi0 --dtype bfloat16 --cameras 3 --batch 1,8,32       # on a GPU
    python -m benchmarks.openpi_policy --size pi05 --dtype bfloat16 --cameras 3 --batch 1,8,32

openpi's side is written from its description (benchmarks/_openpi_reference.py). `quarter` is π0 with every width a
quarter and all depths, heads and token counts its own. Each side runs in a process of its own; they alternate, round by
round. A ratio is openpi's time over ours, of the medians over all calls. The two sides' actions are compared. Our
roofline (`vla_jax.cli.roofline`) is for our program's own text length, openpi's for its padded prompt; fraction:
roofline over p50. π0.5's prompt holds the state in words, so that openpi pads it to 200 tokens.
Programs are kept on disk between rounds, so that only the first one compiles. Writes
benchmarks/results/openpi_policy_SIZE.json (…_rewrites.json) and prints tables.
"""

import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks._peer_cases import ROOT
from vla_jax.cli.command import UsageError, cli, run

GOALS = {2: 1.5, 3: 1.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenpiArgs:
    """What is compared, and for how long."""

    size: Literal["tiny", "quarter", "pi0", "pi05"] = "tiny"
    """The model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations on both sides."""
    cameras: str = "2,3"
    """How many of the three cameras see something."""
    batch: str = "1"
    """Observations per call."""
    num_steps: int = 10
    """Euler steps."""
    unroll: int = 1
    """Of our loop over the steps."""
    text_tokens: int | None = None
    """The longest prompt, to which openpi pads; default: its own, 48 for π0 and 200 for π0.5."""
    rounds: int = 5
    """How often each side's process runs; they alternate."""
    repeats: int = 10
    """Timed calls per process and case."""
    rewrites: bool = False
    """Time our rewrites one by one, at the first batch size and number of cameras."""
    variants: str = ""
    """With --rewrites: only these, e.g. 'all,without fuse'."""
    cache: Path | None = None
    """Directory for compiled programs; default: a temporary one."""
    out: Path | None = None
    """Where the numbers go; default: benchmarks/results/openpi_policy_SIZE.json."""

    def cases(self) -> list[tuple[int, int]]:
        """(batch, cameras). Raises UsageError."""
        try:
            cases = [(int(b), int(c)) for b in self.batch.split(",") for c in self.cameras.split(",")]
        except ValueError:
            raise UsageError("--batch and --cameras are whole numbers separated by commas") from None
        if any(batch < 1 or not 1 <= cameras <= 3 for batch, cameras in cases):
            raise UsageError("--batch is at least 1, --cameras 1 to 3")
        return cases


def worker(side: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON that a process prints last."""
    command = [sys.executable, "-m", "benchmarks._openpi_worker", side, json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UsageError(f"the process of {side} failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: OpenpiArgs, settings: dict[str, Any]) -> dict[str, Any]:
    """Both sides in turns."""
    runs: dict[str, list[dict[str, Any]]] = {"openpi": [], "ours": []}
    for number in range(args.rounds):
        for side in runs:
            runs[side].append(worker(side, settings))
            print(f"round {number + 1}/{args.rounds}: {side}", file=sys.stderr)
    cases = []
    for index, (batch, cameras) in enumerate(args.cases()):
        row: dict[str, Any] = {"batch": batch, "cameras": cameras}
        for side, results in runs.items():
            found = [result["cases"][index] for result in results]
            times = [ms for case in found for ms in case["ms"]]
            row[side] = {
                "p50_ms": statistics.median(times),
                "p95_ms": float(np.percentile(times, 95)),
                "min_ms": min(times),
                "rounds_ms": [statistics.median(case["ms"]) for case in found],
                "first_call_s": found[0]["first_call_s"],
                "text_tokens": found[0]["text_tokens"],
                "roofline_ms": found[0]["roofline_ms"],
            }
            if found[0]["roofline_ms"] is not None:
                row[side]["fraction"] = found[0]["roofline_ms"] / row[side]["p50_ms"]
        ours, theirs = (np.asarray(runs[side][0]["cases"][index]["actions"]) for side in ("ours", "openpi"))
        row["gap"] = float(np.abs(ours - theirs).max())
        row["scale"] = float(np.abs(theirs).max())
        row["ratio"] = row["openpi"]["p50_ms"] / row["ours"]["p50_ms"]
        row["ratio_min"] = row["openpi"]["min_ms"] / row["ours"]["min_ms"]
        cases.append(row)
    head = {key: runs["ours"][0][key] for key in ("device", "parameters", "jax", "peak")}
    return {"settings": settings | {"cache": None}, **head, "cases": cases}


def table(report: dict[str, Any]) -> str:
    """The comparison in markdown."""
    lines = [
        "| batch | cameras | openpi ms, p50 (p95) | ours ms, p50 (p95) | openpi / ours (of minima) | goal |"
        " roofline ms (fraction reached): openpi | ours | largest gap of actions |",
        "|" + "---|" * 9,
    ]
    for row in report["cases"]:
        times = [f"{row[side]['p50_ms']:.4g} ({row[side]['p95_ms']:.4g})" for side in ("openpi", "ours")]
        goal = GOALS.get(row["cameras"], "") if row["batch"] == 1 else ""
        bounds = [_bound(row[side]) for side in ("openpi", "ours")]
        ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f})"
        cells = (row["batch"], row["cameras"], *times, ratio, goal, *bounds)
        lines.append(f"| {' | '.join(map(str, cells))} | {row['gap']:.1e} of {row['scale']:.1f} |")
    return "\n".join(lines)


def _bound(side: dict[str, Any]) -> str:
    if side["roofline_ms"] is None:
        return ""
    return f"{side['roofline_ms']:.3g} ({side['fraction']:.0%}), {side['text_tokens']} text tokens"


def rewrites_table(report: dict[str, Any]) -> str:
    """What leaving out each rewrite costs."""
    best = report["variants"]["all"]
    lines = ["| rewrites | ms, p50 | against all |", "|---|---|---|"]
    for name, row in report["variants"].items():
        lines.append(f"| {name} | {row['p50_ms']:.4g} | {row['p50_ms'] / best['p50_ms'] - 1:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, writes, prints."""
    args = cli(OpenpiArgs, description=__doc__)
    name = f"openpi_policy_{args.size}" + "_rewrites" * args.rewrites
    out = args.out or ROOT / "benchmarks" / "results" / f"{name}.json"
    fields = ("size", "dtype", "num_steps", "unroll", "text_tokens", "rounds", "repeats")
    settings = {field: getattr(args, field) for field in fields}
    settings["text_tokens"] = args.text_tokens or (200 if args.size == "pi05" else 48)
    settings |= {"cases": args.cases(), "variants": [v for v in args.variants.split(",") if v]}
    with tempfile.TemporaryDirectory() as directory:
        settings["cache"] = str(args.cache or directory)
        if args.rewrites:
            result = worker("rewrites", settings)
            result["variants"] = {
                name: {"p50_ms": statistics.median(itertools.chain(*rounds)), "rounds_ms": rounds}
                for name, rounds in result["variants"].items()
            }
            report = {"settings": settings | {"cache": None}, **result}
            text = rewrites_table(report)
        else:
            report = compare(args, settings)
            text = table(report)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{args.size}: {report['parameters'] / 1e6:.4g} M parameters, {args.dtype}, {report['device']}\n\n{text}"
    )


if __name__ == "__main__":
    run(main)
