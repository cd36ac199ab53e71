"""16 models as one program against 16 processes one after another, compile time included; same models, same data.

python -m benchmarks.sweep_speed --out benchmarks/results/sweep_speed.json

Both train and validate (no episodes). The processes are `python -m launch.train` with the cells' own values. Started
quietly on an otherwise idle machine; the order is: one process, the sweep, the other processes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = "configs/lambda_study.py"
WEIGHTS, KAPPAS, SEEDS = (0.1, 1.0, 10.0, 30.0), (0.0, 1.0), (0, 1)


def main() -> None:
    """Runs both and writes the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--data", default="data/tabletop")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="sweep_speed_"))
    common = ["--config", args.config, "--data.path", args.data, "--train.steps", str(args.steps)]
    common += ["--train.val_every", str(args.steps), "--train.save_every", str(args.steps)]
    common += ["--train.tensorboard", "False"]
    cells = [(w, k, s) for w in WEIGHTS for k in KAPPAS for s in SEEDS]

    def alone(cell: tuple[float, float, int]) -> float:
        weight, kappa, seed = cell
        own = ["--objective.action_weight", str(weight), "--objective.insulation", str(kappa)]
        own += ["--seed", str(seed), "--data.seed", "0"]
        folder = scratch / f"{weight}-{kappa}-{seed}"
        return _seconds(["launch.train", *common, *own, "--run-dir", str(folder)])

    try:
        separate = [alone(cells[0])]
        grid = ["--grid", f"objective.action_weight={','.join(map(str, WEIGHTS))}"]
        grid += ["--grid", f"objective.insulation={','.join(map(str, KAPPAS))}", "--seeds", str(len(SEEDS))]
        options = ["--episodes", "0", "--out", str(scratch / "sweep")]
        together = _seconds(["launch.sweep", *common, *grid, *options])
        separate += [alone(cell) for cell in cells[1:]]
        gap = max(_gap(scratch, cell) for cell in cells)
    finally:
        shutil.rmtree(scratch)
    found = {
        "config": args.config,
        "cells": len(cells),
        "steps": args.steps,
        "together_seconds": round(together, 1),
        "separate_seconds": round(sum(separate), 1),
        "separate_each_seconds": [round(s, 1) for s in separate],
        "times_faster": round(sum(separate) / together, 2),
        "largest_relative_gap_of_validation_losses": gap,
    }
    print(json.dumps(found, indent=2))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


def _seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - begin


def _gap(scratch: Path, cell: tuple[float, float, int]) -> float:
    """How far the two ways' last validation losses are apart."""
    weight, kappa, seed = cell
    name = f"action_weight={weight:g},insulation={kappa:g},seed={seed}"
    logs = scratch / f"{weight}-{kappa}-{seed}", scratch / "sweep" / "cells" / name
    lines = [json.loads((log / "metrics.jsonl").read_text().splitlines()[-1]) for log in logs]
    return max(abs(lines[0][k] / lines[1][k] - 1) for k in ("val/text_loss", "val/action_loss"))


if __name__ == "__main__":
    main()
