"""The same training run in 1 process × 8 devices, 2 × 4 and 4 × 2: batches, losses and parameters compared.

python -m benchmarks.hosts --json benchmarks/results/hosts.json

The real program (launch.train, configs/tabletop.py in float32, AdamW) on real demonstrations, 20 steps. The losses
must be equal to 1e-5 and the parameters to 1e-4 relative to the largest of their array. A fourth run is stopped half
way under 2 × 4 and continued under 4 × 2.
"""

import dataclasses
import json
import signal
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks._processes import Group
from launch._main import cli, run

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


def losses(run_dir: Path) -> np.ndarray:
    """Of all steps, in order."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return np.asarray([line["loss"] for line in lines if "loss" in line])


def apart(one: Path, other: Path) -> dict[str, float]:
    """The largest relative differences of losses and of parameters."""
    import jax

    from vla_jax.checkpoint import load

    a, b = losses(one), losses(other)
    pairs = zip(*(jax.tree.leaves(load(path, "params")) for path in (one, other)))
    parameters = [float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-9)) for x, y in pairs]
    return {"losses": float(np.abs(a / b - 1).max()), "parameters": max(parameters)}


def main() -> None:
    """Collects demonstrations, trains four times, compares, prints, writes."""
    args = cli(HostsArgs, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)

        def finish(group: Group) -> None:
            for one in group.wait(3600):
                if one.code:
                    raise ValueError(f"a process ended with {one.code}: {one.said[-3000:]}")

        collect = ["--env", "tabletop", "--episodes", "32", "--out", base / "data"]
        finish(Group("launch.collect", collect, processes=1, devices=1, cache=base / "cache"))

        def start(run_dir: Path, processes: int, devices: int) -> Group:
            options = ["--config", "configs/tabletop.py", "--run-dir", run_dir, "--data.path", base / "data"]
            options += ["--train.steps", args.steps, "--train.log_every", 1, "--train.val_every", 10]
            options += ["--train.save_every", 1000, "--optim.algorithm", "adamw", "--mesh.fsdp", args.fsdp]
            return Group("launch.train", options, processes=processes, devices=devices, cache=base / "cache")

        report, first = {"steps": args.steps, "mesh": f"data={8 // args.fsdp} × fsdp={args.fsdp}"}, None
        for processes, devices in LAYOUTS:
            name = f"{processes}x{devices}"
            begun = time.monotonic()
            finish(start(base / name, processes, devices))
            first = first or base / name
            report[name] = apart(base / name, first) | {"seconds": time.monotonic() - begun}
            print(name, report[name], flush=True)

        mixed = base / "mixed"
        group = start(mixed, 2, 4)
        path = mixed / "metrics.jsonl"
        while group.running() and not (
            path.exists() and len(path.read_text().splitlines()) >= args.steps // 2
        ):
            time.sleep(0.05)
        group.signal(1, signal.SIGTERM)
        finish(group)
        stopped = len(losses(mixed))
        finish(start(mixed, 4, 2))
        report["2x4, continued as 4x2"] = apart(mixed, first) | {"stopped_at": stopped}
    print(json.dumps(report, indent=2))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
