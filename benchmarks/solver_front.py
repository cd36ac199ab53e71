"""Which solver with how many steps: error, success and latency of a trained policy, in one picture.

    python -m benchmarks.solver_front --checkpoint runs/tabletop --episodes 256 --json FILE --plot FILE
    python -m benchmarks.solver_front --checkpoint runs/mt3 --episodes 20 --execute 8 --name metaworld
    python -m benchmarks.solver_front --join FILE FILE --plot FILE        # several reports in one picture, a row each

Error: root mean square difference of normalised chunks from 100 midpoint steps of the plain float32 policy, same noise,
over the reference's own size; at the first observations of held-out episodes. Success: held-out episodes with the
compiled policy, the same scenes for every solver, 95 % Wilson intervals. Latency: one robot, numpy to numpy, the
compiled policy; the solvers take turns, medians.

The default that follows: the fastest solver whose error is at most `--tolerance` and whose interval of success reaches
up to the best solver's rate.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes

from vla_jax.cli import policy_report
from vla_jax.cli.command import UsageError, cli, run
from vla_jax.cli.latency import in_float32
from vla_jax.data.observations import take
from vla_jax.flow.config import FIXED, SolverConfig
from vla_jax.serve.compiled.config import CompileConfig, Rewrites
from vla_jax.serve.policy import Policy
from vla_jax.sim import metrics
from vla_jax.sim.env import VectorEnv
from vla_jax.sim.evaluate import EvaluateConfig, Runner, pieces_of, silent
from vla_jax.sim.figures import style
from vla_jax.sim.tabletop import TabletopEnv
from vla_jax.types import Observation

REFERENCE = SolverConfig(method="midpoint", num_steps=100)
RESULTS = Path("benchmarks/results")
ROBOTS = 64
"""Environments in one batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontArgs:
    """What to compare."""

    checkpoint: Path | None = None
    """Run directory, or one step in it."""
    join: tuple[Path, ...] = ()
    """Reports of earlier runs, to be drawn below one another; nothing is measured."""
    solvers: str = "euler:1,2,3,5,10,20 midpoint:1,2,3,5,10 heun:2,5 rk4:1,2"
    """Solvers and their numbers of steps."""
    episodes: int = 128
    """Held-out episodes per solver (of each task)."""
    execute: int = 1
    """Actions run of each chunk."""
    env: str | None = None
    """tabletop, or metaworld:TASK,…; default: what the policy was trained on."""
    observations: int = 32
    """At which the error is measured."""
    calls: int = 60
    """Timed calls per solver."""
    tolerance: float = 0.05
    """Largest relative error of a default."""
    name: str | None = None
    """For the title and the default names of the files; default: the environment."""
    json: Path | None = None
    """Default: benchmarks/results/solver_front_NAME.json."""
    plot: Path | None = None
    """Default: benchmarks/results/solver_front_NAME.png; with --join solver_front.png there."""

    def __post_init__(self):
        if (self.checkpoint is None) == (not self.join):
            raise UsageError("give one of --checkpoint and --join")

    def chosen(self) -> list[SolverConfig]:
        """The solvers. Raises UsageError."""
        found = []
        for entry in self.solvers.split():
            method, _, steps = entry.partition(":")
            if method not in FIXED or not all(step.isdigit() and int(step) for step in steps.split(",")):
                raise UsageError(
                    f"--solvers {entry!r}: give METHOD:STEPS,STEPS with one of {', '.join(FIXED)}"
                )
            found += [SolverConfig(method=method, num_steps=int(step)) for step in steps.split(",")]
        return found


def main() -> None:
    """Measures, writes, prints; or draws what was measured."""
    args = cli(FrontArgs, description=__doc__)
    if args.join:
        plot = args.plot or RESULTS / "solver_front.png"
        draw([json.loads(path.read_text()) for path in args.join], plot)
        print(f"wrote {plot}")
    else:
        measure(args)


def measure(args: FrontArgs) -> None:
    """One policy."""
    solvers = args.chosen()
    policy = Policy.load(args.checkpoint, batch_size=32)
    kind, tasks = policy_report.environment_of(policy, args.env)
    name = args.name or kind
    out, plot = (
        given or RESULTS / f"solver_front_{name}.{end}"
        for given, end in ((args.json, "json"), (args.plot, "png"))
    )
    for path in (out, plot):
        policy_report.check_writable(path)
    compiled = policy.compiled(CompileConfig(rewrites=Rewrites(reuse=False), buckets=policy.call_sizes))
    env = make_env(policy, kind, tasks[0] if tasks else None, args.observations)
    observation = env.reset(EvaluateConfig(episodes=args.observations).seeds())
    rows = errors(policy, compiled, observation, solvers)
    for row, ms in zip(rows, latencies(compiled, observation, solvers, args.calls)):
        row |= ms
    for row, solver in zip(rows, solvers):
        row |= success(compiled, args, solver, kind, tasks)
        print(line(row), flush=True)
    best = recommended(rows, args.tolerance)
    report = {
        "name": name,
        "step": policy.step,
        "config_hash": policy.config_hash,
        "episodes": args.episodes * max(1, len(tasks)),
        "execute": args.execute,
        "device": jax.devices()[0].device_kind,
        "tolerance": args.tolerance,
        "recommended": best,
        "solvers": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    draw([report], plot)
    print(f"\nrecommended: {best}\nwrote {out} and {plot}")


def make_env(policy: Policy, kind: str, task: str | None, robots: int) -> VectorEnv:
    """The environment, of one task."""
    if kind == "tabletop":
        return TabletopEnv(policy_report.tabletop_of(policy))
    from vla_jax.sim.metaworld import MetaWorldEnv  # needs the extra `sim`

    return MetaWorldEnv([task] * robots, policy_report.camera_size(policy, "corner2"))


def errors(
    policy: Policy, compiled: Policy, observation: Observation, solvers: list[SolverConfig]
) -> list[dict[str, Any]]:
    """Relative error of each solver's chunks."""
    key = jax.random.key(7)
    with jax.default_matmul_precision("highest"):
        reference = policy.in_scale(in_float32(policy).act(observation, key, solver=REFERENCE))
    size = np.sqrt(np.mean(reference**2))
    rows = []
    for solver in solvers:
        found = policy.in_scale(compiled.act(observation, key, solver=solver))
        error = np.sqrt(np.mean((found - reference) ** 2)) / size
        rows.append(
            {"solver": solver.method, "num_steps": solver.num_steps, "nfe": solver.nfe, "error": float(error)}
        )
    return rows


def latencies(
    compiled: Policy, observation: Observation, solvers: list[SolverConfig], calls: int
) -> list[dict[str, float]]:
    """Milliseconds of a call for one robot, the solvers in turns."""
    one, key = take(observation, [0]), jax.random.key(0)
    taken: dict[SolverConfig, list[float]] = {solver: [] for solver in solvers}
    for number in range(calls + 3):
        for solver in solvers:
            start = time.perf_counter()
            compiled.act(one, key, solver=solver)
            if number >= 3:
                taken[solver].append(1e3 * (time.perf_counter() - start))
    return [
        {"ms_p50": float(np.median(times)), "ms_p95": float(np.percentile(times, 95))}
        for times in taken.values()
    ]


def success(
    compiled: Policy, args: FrontArgs, solver: SolverConfig, kind: str, tasks: tuple[str, ...]
) -> dict[str, Any]:
    """Share of held-out episodes that end well, with its interval."""
    config = EvaluateConfig(episodes=args.episodes, execute=args.execute)
    runner = Runner(compiled, config, solver, silent)
    records = []
    for task in tasks or (None,):
        for seeds in pieces_of(config.seeds(), ROBOTS):
            env = make_env(compiled, kind, task, len(seeds))
            records += runner.run(solver.method, env, seeds).records
            if kind == "metaworld":
                env.close()
    summary = metrics.success_summary(records)
    return {"success": summary["success"], "success_ci": list(summary["success_ci"])}


def recommended(rows: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """The fastest of those that are accurate and as good as the best; the most accurate where none is."""
    best = max(row["success"] for row in rows)
    good = [row for row in rows if row["error"] <= tolerance and row["success_ci"][1] >= best]
    row = min(good, key=lambda row: row["ms_p50"]) if good else min(rows, key=lambda row: row["error"])
    return {"solver": row["solver"], "num_steps": row["num_steps"]}


def line(row: dict[str, Any]) -> str:
    """One solver in markdown."""
    low, high = row["success_ci"]
    return (
        f"| {row['solver']} {row['num_steps']} | {row['nfe']} | {row['error']:.1e} | "
        f"{100 * row['success']:.1f} % ({100 * low:.1f}–{100 * high:.1f}) | {row['ms_p50']:.2f} ({row['ms_p95']:.2f}) |"
    )


def draw(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Error and success against latency, a line per solver; a row per report."""
    bests = [(report["name"], report["recommended"]) for report in reports]
    told = "; ".join(f"{name}: {best['solver']} with {best['num_steps']} steps" for name, best in bests)
    figure = style.new_figure(11.5, 4.8 * len(reports), f"Recommended: {told}")
    for (left, right), report in zip(figure.subplots(len(reports), 2, squeeze=False), reports):
        _lines(left, report["solvers"], "error")
        left.set(yscale="log")
        left.axhline(report["tolerance"], color=style.FAINT, linestyle="--", linewidth=1)
        style.tidy(
            left, xlabel="median latency of a call (ms)", ylabel="relative error of the chunk",
            title=f"{report['name']}: against 100 midpoint steps; numbers are steps",
        )  # fmt: skip
        _lines(right, report["solvers"], "success")
        style.tidy(
            right, xlabel="median latency of a call (ms)", ylabel="success",
            title=f"{report['name']}: {report['episodes']} held-out episodes, 95 % intervals",
        )  # fmt: skip
        left.legend(frameon=False)
    style.save(figure, path)


def _lines(axes: Axes, rows: list[dict[str, Any]], what: str) -> None:
    for colour, method in zip(style.PALETTE, dict.fromkeys(row["solver"] for row in rows)):
        mine = sorted((row for row in rows if row["solver"] == method), key=lambda row: row["num_steps"])
        x, y = [row["ms_p50"] for row in mine], np.asarray([row[what] for row in mine])
        axes.plot(x, y, marker="o", label=method, color=colour)
        if what == "success":
            bounds = np.asarray([row["success_ci"] for row in mine]).T
            axes.errorbar(x, y, yerr=[y - bounds[0], bounds[1] - y], fmt="none", color=colour, alpha=0.4)
        for row, place in zip(mine, zip(x, y)):
            axes.annotate(
                str(row["num_steps"]),
                place,
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=9,
                color=colour,
            )


if __name__ == "__main__":
    run(main)
