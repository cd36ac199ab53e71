"""The same training run in 1 process × 8 devices, 2 × 4 and 4 × 2: batches, metrics and parameters compared.

python -m benchmarks.hosts --json benchmarks/results/hosts.json

The real program (launch.train, configs/tabletop.py in float32, AdamW) on real demonstrations, 20 steps. Every row of
every batch must be the same, the losses equal to 1e-5, every other number of metrics.jsonl, validations' too, to 1e-4
and the parameters to 1e-4 of the largest of their array; else this fails. (Not the encoder's biases of keys, on which
nothing depends.) A fourth run is stopped half way under 2 × 4 and continued under 4 × 2: none of its batches may be
lost or repeated.
"""

import dataclasses
import json
import signal
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks._processes import Group
from vla_jax.cli.command import cli, run

LAYOUTS = ((1, 8), (2, 4), (4, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsArgs:
    """How long."""

    steps: int = 20
    """Steps of each run."""
    fsdp: int = 2
    """Devices that share the parameters."""
    json: Path | None = None
    """Where to write the report."""


BARS = {"losses": 1e-5, "metrics": 1e-4, "parameters": 1e-4}
"""Largest relative differences."""


NOTHING_DEPENDS_ON = "['key']['bias']"
"""What is added to all keys alike shifts all scores of a query alike, and no softmax notices: its gradient is rounding
alone, and Adam makes whole steps of that. How far these are apart is reported, absolutely, and has no bar."""


def metrics(run_dir: Path) -> list[dict[str, np.ndarray]]:
    """The numbers of every line of metrics.jsonl, in order."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: np.asarray(value, float) for name, value in line.items()} for line in lines]


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two arrays, over the largest of them; what is not a number in both is equal."""
    if not np.array_equal(np.isnan(ours), np.isnan(theirs)):
        return float("inf")
    gap = np.nanmax(np.abs(ours - theirs), initial=0)
    return float(gap / max(np.nanmax(np.abs(theirs), initial=0), 1e-9))


def apart(one: Path, other: Path) -> dict[str, float]:
    """The largest relative differences of losses, of all other metrics and of parameters."""
    import jax

    from vla_jax.checkpoint import load

    found = {"losses": 0.0, "metrics": 0.0}
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        if ours.keys() != theirs.keys():
            raise ValueError(f"{one} and {other} have other metrics: {sorted(ours.keys() ^ theirs.keys())}")
        for name in ours:
            kind = "losses" if name.endswith("loss") else "metrics"
            found[kind] = max(found[kind], relative(ours[name], theirs[name]))
    ours, theirs = (jax.tree_util.tree_leaves_with_path(load(path, "params")) for path in (one, other))
    found |= {"parameters": 0.0, "key_biases": 0.0}
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        if jax.tree_util.keystr(path).endswith(NOTHING_DEPENDS_ON):
            found["key_biases"] = max(found["key_biases"], float(np.abs(np.asarray(x) - y).max()))
        else:
            found["parameters"] = max(found["parameters"], relative(np.asarray(x), np.asarray(y)))
    return found


def batches(*records: Path, until: int) -> dict[tuple[int, int], str]:
    """(step, row) → digest, of all processes; raises ValueError where two have another row of the same name."""
    found: dict[tuple[int, int], str] = {}
    for path in (path for record in records for path in sorted(record.glob("*.jsonl"))):
        for line in map(json.loads, path.read_text().splitlines()):
            for row, digest in line["rows"].items():
                place = line["step"], int(row)
                if line["step"] <= until and found.setdefault(place, digest) != digest:
                    raise ValueError(f"row {row} of step {line['step']} is another one in {path.name}")
    return found


def check(name: str, report: dict) -> None:
    """Raises ValueError where a layout is over a bar."""
    over = [
        f"{what} {report[what]:.2g} (at most {bar:g})" for what, bar in BARS.items() if report[what] > bar
    ]
    if over or not report["same_batches"]:
        raise ValueError(f"{name}: {', '.join(over) or 'other batches'}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Starts the real training in a folder, on its data."""

    args: HostsArgs
    base: Path

    def finish(self, group: Group) -> None:
        """Waits; raises ValueError where a process failed."""
        for one in group.wait(3600):
            if one.code:
                raise ValueError(f"a process ended with {one.code}: {one.said[-3000:]}")

    def collect(self) -> None:
        """The demonstrations that all runs train on."""
        options = ["--env", "tabletop", "--episodes", "32", "--out", self.base / "data"]
        self.finish(Group("launch.collect", options, processes=1, devices=1, cache=self.base / "cache"))

    def start(self, run_dir: Path, processes: int, devices: int, record: Path) -> Group:
        """One training run; its batches' digests go to the folder `record`."""
        args = self.args
        options = ["--config", "configs/tabletop.py", "--run-dir", run_dir, "--data.path", self.base / "data"]
        options += ["--train.steps", args.steps, "--train.log_every", 1, "--train.val_every", 10]
        options += ["--train.save_every", 1000, "--optim.algorithm", "adamw", "--mesh.fsdp", args.fsdp]
        return Group(
            "benchmarks._recorded_train",
            options,
            processes=processes,
            devices=devices,
            cache=self.base / "cache",
            variables={"VLA_RECORD": str(record)},
        )


def layouts(bench: Bench) -> tuple[dict[str, dict], dict[tuple[int, int], str]]:
    """A report of every layout against the first, and the first's batches."""
    reports: dict[str, dict] = {}
    whole: dict[tuple[int, int], str] = {}
    first = bench.base / "{}x{}".format(*LAYOUTS[0])
    for processes, devices in LAYOUTS:
        name = f"{processes}x{devices}"
        begun, record = time.monotonic(), bench.base / "record" / name
        bench.finish(bench.start(bench.base / name, processes, devices, record))
        seen = batches(record, until=bench.args.steps)
        whole = whole or seen
        reports[name] = {"seconds": time.monotonic() - begun, "same_batches": seen == whole}
        reports[name] |= apart(bench.base / name, first) | {"rows_compared": len(seen)}
        print(name, reports[name], flush=True)
    return reports, whole


def continued(bench: Bench, whole: dict[tuple[int, int], str]) -> dict:
    """A run that is stopped half way under 2 × 4 and continued under 4 × 2, against the first layout's."""
    from vla_jax.checkpoint import read_meta

    mixed, steps = bench.base / "mixed", bench.args.steps
    records = (bench.base / "record" / "before", bench.base / "record" / "after")
    group, path = bench.start(mixed, 2, 4, records[0]), mixed / "metrics.jsonl"
    while group.running() and not (path.exists() and len(path.read_text().splitlines()) >= steps // 2):
        time.sleep(0.05)
    group.signal(1, signal.SIGTERM)
    bench.finish(group)
    stopped = read_meta(mixed)["step"]
    bench.finish(bench.start(mixed, 4, 2, records[1]))
    before, after = (batches(record, until=until) for record, until in zip(records, (stopped, steps)))
    same = before | after == whole and not before.keys() & after.keys()
    first = bench.base / "{}x{}".format(*LAYOUTS[0])
    return apart(mixed, first) | {"same_batches": same, "stopped_at": stopped}


def main() -> None:
    """Collects demonstrations, trains four times, compares, prints, writes."""
    args = cli(HostsArgs, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args=args, base=Path(folder))
        bench.collect()
        reports, whole = layouts(bench)
        mixed = continued(bench, whole)
    reports["2x4, continued as 4x2"] = mixed
    report = {"steps": args.steps, "mesh": f"data={8 // args.fsdp} × fsdp={args.fsdp}", **reports}
    print(json.dumps(report, indent=2))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    for name, found in reports.items():
        check(name, found)
    stopped = mixed["stopped_at"]
    if not args.steps > stopped > 0:
        raise ValueError(
            f"the mixed run was stopped at step {stopped} of {args.steps}: nothing was continued"
        )


if __name__ == "__main__":
    run(main)
