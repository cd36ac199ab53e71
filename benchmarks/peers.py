"""Our samplers beside Meta's flow_matching, torchcfm and diffusers: the same weights, equal numbers, time ratios.

    pip install -r requirements-peers.txt && pip install --no-deps torchcfm==1.0.7
    python -m benchmarks.peers

A velocity field for 16 x 7 action chunks given a 64-d observation (a 512 x 3 SiLU network) is trained once. Then each
library samples with it in a process of its own, since the thread pools of torch and XLA fight over the cores of one;
the processes alternate, round by round. A ratio is theirs over ours (above 1: ours is faster), of the fastest
repetition of all rounds, and of the medians (median over rounds), which a busy machine disturbs more. Before the
clock starts both have run; both encode the observation once per solve, outside the steps.

Writes benchmarks/results/flow_peers.json and prints a markdown table.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks._peer_cases import CASES, ROOT
from vla_jax.cli.command import UsageError, cli, run

LIBRARIES = {"ours": "benchmarks._peer_ours", "theirs": "benchmarks._peer_torch"}
GOALS = {"euler": {1: 1.3, 256: 1.0}, "midpoint": {1: 1.3, 256: 1.0}, "dopri5": {1: 1.2, 256: 1.2}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeersArgs:
    """How long to measure."""

    rounds: int = 5
    """How often each library's process runs; they alternate."""
    repeats: int = 40
    """Repetitions of every case in one process."""
    threads: int = 2
    """Cores that a process may use."""
    out: Path = Path("benchmarks/results/flow_peers.json")
    """Where the numbers go."""

    def __post_init__(self):
        if self.rounds < 1 or self.repeats < 1 or self.threads < 1:
            raise UsageError("--rounds, --repeats and --threads must be at least 1")


def worker(module: str, *args: str, cores: set[int]) -> dict:
    """The JSON that a process of `module` prints last, running on `cores` only."""
    flag = f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={len(cores)}"
    threads = {"OMP_NUM_THREADS": str(len(cores)), "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        cwd=ROOT,
        env={**os.environ, **threads},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode:
        raise UsageError(f"python -m {module} failed, see above; are requirements-peers.txt installed?")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: PeersArgs) -> dict:
    """Numbers of every case: times of each library, evaluations, and how far their samples are apart."""
    cores = set(sorted(os.sched_getaffinity(0))[: args.threads])
    with tempfile.TemporaryDirectory() as directory:
        weights = f"{directory}/weights.npz"
        trained = worker("benchmarks._peer_ours", "train", weights, cores=cores)
        print(f"trained: loss {trained['first_loss']:.3f} to {trained['last_loss']:.3f}", file=sys.stderr)
        rounds = {name: [] for name in LIBRARIES}
        for i in range(args.rounds):
            for name, module in LIBRARIES.items():
                samples = f"{directory}/{name}.npz"
                rounds[name].append(worker(module, "time", weights, str(args.repeats), samples, cores=cores))
                print(f"round {i + 1}/{args.rounds}: {name}", file=sys.stderr)
        made = {name: dict(np.load(f"{directory}/{name}.npz")) for name in LIBRARIES}
    cases = []
    for case in CASES:
        key = case.key
        row = {
            "case": key,
            "peer": case.peer,
            "method": case.method,
            "batch": case.batch,
            "steps": case.steps,
        }
        for name in LIBRARIES:
            times = [r["ms"][key] for r in rounds[name]]
            row[name] = {
                "min_ms": min(min(t) for t in times),
                "median_ms": statistics.median(statistics.median(t) for t in times),
                "nfe": rounds[name][-1]["nfe"][key],
            }
        row["ratio_min"] = row["theirs"]["min_ms"] / row["ours"]["min_ms"]
        row["ratio_median"] = row["theirs"]["median_ms"] / row["ours"]["median_ms"]
        row["gap"] = float(np.abs(made["ours"][key] - made["theirs"][key]).max())
        row["scale"] = float(np.abs(made["theirs"][key]).max())
        cases.append(row)
    return {
        "protocol": {"rounds": args.rounds, "repeats": args.repeats, "cores": len(cores), "chunk": [16, 7]},
        "versions": {**rounds["ours"][-1]["versions"], **rounds["theirs"][-1]["versions"]},
        "cases": cases,
        "likelihood_of_chunks": {name: rounds[name][-1]["likelihood_of_chunks"] for name in LIBRARIES},
        "likelihood_of_vectors": {name: rounds[name][-1]["likelihood_of_vectors"] for name in LIBRARIES},
        "couplings": {name: rounds[name][-1]["couplings"] for name in LIBRARIES},
    }


def table(report: dict) -> str:
    """The report in markdown."""
    lines = [
        "| peer | method | batch | NFE ours / theirs | ours ms, min (median) | theirs ms, min (median) |"
        " theirs / ours, min (median) | goal | largest gap of samples |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["cases"]:
        ours, theirs = row["ours"], row["theirs"]
        goal = GOALS.get(row["method"], {}).get(row["batch"]) if row["peer"] == "flow_matching" else None
        times = (f"{x['min_ms']:.2f} ({x['median_ms']:.2f})" for x in (ours, theirs))
        name = row["method"] + (f"-{row['steps']}" if row["steps"] else "")
        ratio = f"{row['ratio_min']:.2f} ({row['ratio_median']:.2f})"
        fields = (row["peer"], name, row["batch"], f"{ours['nfe']} / {theirs['nfe']}", *times, ratio)
        lines.append(
            f"| {' | '.join(map(str, fields))} | {goal or ''} | {row['gap']:.1e} of {row['scale']:.1f} |"
        )
    chunks, vectors = report["likelihood_of_chunks"], report["likelihood_of_vectors"]
    ours, theirs = report["couplings"]["ours"], report["couplings"]["theirs"]
    lines += [
        "",
        f"Exact log-likelihood of four 16 x 7 chunks: ours {chunks['ours']}; theirs {chunks['theirs']}. Of the same"
        f" as flat vectors: {vectors['ours']} and {vectors['theirs']}.",
        "",
        f"Optimal pairs of 256 chunks with noise, squared distance: {ours['cost']:.6g}; torchcfm's plan"
        f" {theirs['cost']:.6g}, whose draws with replacement (its default) use {theirs['used']} of 256 noises."
        f" x_t and velocity of torchcfm's path: {theirs['path_gap']:.1e} apart from (1-t) eps + t a.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, write, print."""
    args = cli(PeersArgs, description=__doc__)
    report = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    run(main)
