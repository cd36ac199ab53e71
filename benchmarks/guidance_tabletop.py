"""How well a policy follows its instruction against the guidance weight w, on the tabletop.

python -m benchmarks.guidance_tabletop --checkpoint runs/guided --json benchmarks/results/guidance_tabletop.json

The policy must have been trained with objective.prompt_dropout above 0. Two sets of episodes per weight: the scenes'
own instructions, and instructions for another object in the same scenes (nothing but the words says which). w = 0
ignores the instruction, w = 1 is the plain policy. All weights run one compiled program, which is counted.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_jax.cli.command import cli, run

if TYPE_CHECKING:
    from vla_jax.serve.policy import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceArgs:
    """Which policy, which weights, how many scenes."""

    checkpoint: Path
    """Run directory of a policy for the tabletop."""
    weights: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
    """Values of w."""
    episodes: int = 256
    """Held-out scenes."""
    execute: int = 2
    """Actions run of each chunk."""
    num_steps: int = 10
    """Euler steps."""
    seed: int = 0
    """Chooses the scenes and the noise."""
    batch_size: int = 64
    """Most robots in one call of the network."""
    json: Path | None = None
    """File for the results."""


def main() -> None:
    """Sweeps the weight, prints the table, writes the results."""
    args = cli(GuidanceArgs, description=__doc__)
    from vla_jax.serve.policy import Policy

    policy = Policy.load(args.checkpoint, batch_size=args.batch_size)
    if not policy.guides:
        sys.exit(f"{args.checkpoint} was trained with objective.prompt_dropout=0: it knows no null prompt")
    rows, programs = [], []
    for weight in args.weights:
        rows.append({"weight": weight} | measure(policy, args, weight))
        programs.append(len(policy.runner.compiler.shapes))
        print(rows[-1], flush=True)
    print("\n" + table(rows))
    print(
        f"\nprograms compiled: {programs[0]} for the first weight, {programs[-1] - programs[0]} for all others"
    )
    if args.json is not None:
        settings = {key: getattr(args, key) for key in ("episodes", "execute", "num_steps", "seed")}
        results = {"args": settings, "step": policy.step, "programs": programs, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")
        print(f"wrote {args.json}")


def measure(policy: "Policy", args: GuidanceArgs, weight: float) -> dict[str, Any]:
    """What one weight makes of both kinds of instructions."""
    from vla_jax.cli.policy_report import tabletop_of
    from vla_jax.flow.config import SolverConfig
    from vla_jax.sim import metrics
    from vla_jax.sim.evaluate import EvaluateConfig, Runner, motion_of, silent
    from vla_jax.sim.tabletop import TabletopEnv

    began = time.perf_counter()
    config = EvaluateConfig(
        episodes=args.episodes, seed=args.seed, execute=args.execute, guidance=weight, samples=8
    )
    found: dict[str, Any] = {}
    solver, table = SolverConfig(num_steps=args.num_steps), tabletop_of(policy)
    for instruction in ("own", "swapped"):
        env = TabletopEnv(table, instruction=instruction)
        records = Runner(policy, config, solver, silent).run(instruction, env, config.seeds()).records
        grasped = [r for r in records if r["reached"] is not None]
        obeyed = sum(r["reached"] == r["target"] for r in grasped)
        found[instruction] = {
            "success": metrics.success_summary(records)["success"],
            "success_ci": metrics.success_summary(records)["success_ci"],
            "collision": metrics.mean_of(records, "collision"),
            "grasped": len(grasped) / len(records),
            "obeyed_of_grasped": obeyed / len(grasped) if grasped else None,
            **motion_of(records),
        }
    observation = TabletopEnv(table).reset(config.seeds()[:64])
    runner = Runner(policy, config, solver, silent)
    chunks = policy.act(observation, runner.key("diversity"), solver=solver, samples=8, guidance=weight)
    speed = np.linalg.norm(np.asarray(chunks)[..., :2], axis=-1)
    found["diversity"] = metrics.chunk_diversity(np.asarray(chunks), policy.action_scale)
    found["too_fast"] = float(np.mean(speed > 1.1 * table.max_speed_m_per_s))
    found["took_s"] = round(time.perf_counter() - began, 1)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| w | success | told another object: grasps it | of what it grasps, what it was told | collisions | "
        "jerk (m/s³) | chunk diversity | commands over the speed limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own, swapped = row["own"], row["swapped"]
        low, high = swapped["success_ci"]
        obeyed = swapped["obeyed_of_grasped"]
        cells = [
            f"{row['weight']:g}",
            f"{100 * own['success']:.1f} %",
            f"{100 * swapped['success']:.1f} % ({100 * low:.0f}–{100 * high:.0f})",
            "–" if obeyed is None else f"{100 * obeyed:.1f} %",
            f"{100 * own['collision']:.1f} %",
            f"{own['jerk']:.2f}",
            f"{row['diversity']:.3f}",
            f"{100 * row['too_fast']:.1f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
