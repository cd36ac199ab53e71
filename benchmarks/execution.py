"""Executors under delay, on the tabletop: what a prediction that takes d control steps costs, and what mends it.

python -m benchmarks.execution --checkpoint runs/quickstart/flow --json benchmarks/results/execution.json

python -m benchmarks.execution --checkpoint runs/quickstart/flow --prefix-checkpoint runs/prefix --delays 0 2 4

The same held-out scenes for every executor. A prediction is asked for as often as one can be computed: every max(1, d)
steps. Synchronous robots stand still meanwhile. `--prefix-checkpoint` is a policy trained with objective.rtc_prefix,
for training-time real-time chunking; its own naive asynchronous execution stands beside it. Exits 1 where real-time
chunking jumps more at chunk borders than naive asynchronous execution does.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_jax.cli.command import cli, run

if TYPE_CHECKING:
    from vla_jax.serve.policy import Policy

KINDS = {
    "receding": "synchronous: stands still",
    "async": "naive asynchronous",
    "ensemble": "temporal ensembling",
    "rtc": "real-time chunking, true vjp",
    "rtc_jacobian_free": "real-time chunking, Jacobian-free",
    "rtc_short": "real-time chunking, true vjp, pulled for d + 2 steps",
    "rtc_jacobian_free_short": "real-time chunking, Jacobian-free, pulled for d + 2 steps",
}
PREFIX_KINDS = {"async": "naive asynchronous ²", "rtc_prefix": "real-time chunking, trained prefix ²"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionArgs:
    """Which policies, which delays, how many scenes."""

    checkpoint: Path
    """Run directory of a flow policy for the tabletop."""
    prefix_checkpoint: Path | None = None
    """One that was trained with objective.rtc_prefix of at least the largest delay."""
    delays: tuple[int, ...] = (0, 2, 4)
    """Control steps (0.1 s) that a prediction takes."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Executors to compare."""
    episodes: int = 256
    """Held-out scenes."""
    num_steps: int = 10
    """Euler steps."""
    seed: int = 0
    """Chooses the scenes and the noise."""
    batch_size: int = 64
    """Most robots in one call of the network."""
    json: Path | None = None
    """File for the results."""


def main() -> None:
    """Runs every executor at every delay, prints the table, writes the results."""
    args = cli(ExecutionArgs, description=__doc__)
    from vla_jax.serve.policy import Policy

    policies = [("", args.checkpoint, {kind: KINDS[kind] for kind in args.kinds})]
    if args.prefix_checkpoint is not None:
        policies.append(("prefix", args.prefix_checkpoint, PREFIX_KINDS))
    rows: list[dict[str, Any]] = []
    for name, path, kinds in policies:
        policy = Policy.load(path, batch_size=args.batch_size)
        for delay in args.delays:
            for kind, title in kinds.items():
                row = {"policy": name, "kind": kind, "title": title, "delay": delay}
                rows.append(row | measure(policy, args, kind, delay))
                print(rows[-1], flush=True)
    print("\n" + table(rows))
    if args.json is not None:
        settings = {key: getattr(args, key) for key in ("delays", "episodes", "num_steps", "seed")}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"args": settings, "rows": rows}, indent=2) + "\n")
        print(f"wrote {args.json}")
    worse = [f"{r['title']} at delay {r['delay']}" for r in rows if jumps_more(r, rows)]
    if worse:
        sys.exit(f"jumps more at chunk borders than naive asynchronous execution: {', '.join(worse)}")


def measure(policy: "Policy", args: ExecutionArgs, kind: str, delay: int) -> dict[str, Any]:
    """Success and smoothness of one executor at one delay."""
    from vla_jax.cli.policy_report import tabletop_of
    from vla_jax.flow.config import SolverConfig
    from vla_jax.sim import metrics
    from vla_jax.sim.evaluate import EvaluateConfig, Runner, motion_of, pieces_of, silent
    from vla_jax.sim.tabletop import TabletopEnv

    config = EvaluateConfig(
        episodes=args.episodes,
        seed=args.seed,
        executor=kind.removesuffix("_short"),
        execute=max(1, delay),
        delay=delay,
        overlap=delay + 2 if kind.endswith("_short") else None,
    )
    runner = Runner(policy, config, SolverConfig(num_steps=args.num_steps), silent)
    env, began = TabletopEnv(tabletop_of(policy)), time.perf_counter()
    pieces = pieces_of(config.seeds(), 256)
    records = [record for seeds in pieces for record in runner.run(kind, env, seeds).records]
    return {
        **metrics.success_summary(records),
        "collision": metrics.mean_of(records, "collision"),
        "time_s": metrics.mean_of([r for r in records if r["success"]], "time_s"),
        **motion_of(records),
        "took_s": round(time.perf_counter() - began, 1),
    }


def jumps_more(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether a row of real-time chunking jumps more at its borders than the naive one of its policy and delay."""
    if not row["kind"].startswith("rtc"):
        return False
    same = ("policy", "delay")
    naive = [r for r in rows if r["kind"] == "async" and all(r[key] == row[key] for key in same)]
    return any(row["switch_jump"] >= r["switch_jump"] for r in naive)


def table(rows: list[dict[str, Any]]) -> str:
    """The results in Markdown; jumps in cm/s, jerk in m/s³."""
    lines = [
        "| delay (steps) | executor | success | collisions | time (s) | jerk (m/s³) | jump at borders (cm/s) | "
        "elsewhere |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: r["delay"]):
        low, high = row["success_ci"]
        cells = [
            str(row["delay"]),
            row["title"],
            f"{100 * row['success']:.1f} % ({100 * low:.0f}–{100 * high:.0f})",
            f"{100 * row['collision']:.1f} %",
            _number(row["time_s"], 2),
            _number(row["jerk"], 2),
            _number(row["switch_jump"], 2, 100),
            _number(row["step_jump"], 2, 100),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "–" if value is None else f"{scale * value:.{digits}f}"


if __name__ == "__main__":
    run(main)
