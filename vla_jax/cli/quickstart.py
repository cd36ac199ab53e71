"""The whole job on a laptop: demonstrations, a flow policy and a regression policy, evaluation, pictures, a table.

python -m launch.quickstart

Each stage is one command, printed as you would type it. A stage that is done is skipped, so running this again
after a stop goes on where it stopped.
"""

import dataclasses
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from vla_jax.cli.command import cli, typed
from vla_jax.cli.config_file import find_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartArgs:
    """Where to, and how much."""

    out: Path = Path("runs/quickstart")
    """Directory of everything: data, runs, reports, figures, RESULT.md."""
    fast: bool = False
    """A shortened form that only shows that every stage works; the policies learn nothing."""
    config: str = "tabletop"
    """Training configuration of both policies, a file or a name; the second one's process is regression instead."""
    seed: int = 0
    """Seed of the evaluation's scenes."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command and its options."""

    name: str
    command: str
    options: tuple[str, ...]

    def typed(self) -> str:
        """What a user would type."""
        return shlex.join([*typed(self.command), *self.options])


def stages(args: QuickstartArgs) -> list[Stage]:
    """All commands, in order."""
    out = args.out
    demonstrations, episodes, training = 10_000, 512, ()
    if args.fast:
        demonstrations, episodes = 64, 16
        training = ("--train.steps", "20", "--train.batch_size", "16", "--train.val_every", "0")
    found = [
        Stage(
            "collect demonstrations",
            "collect",
            ("--env", "tabletop", "--episodes", str(demonstrations), "--out", str(out / "data")),
        )
    ]
    for process in ("flow", "regression"):
        options = ("--config", args.config, "--run-dir", str(out / process))
        options += ("--data.path", str(out / "data"), "--process.kind", process)
        found.append(Stage(f"train {process}", "train", options + training))
    for process in ("flow", "regression"):
        options = ("--checkpoint", str(out / process), "--episodes", str(episodes), "--seed", str(args.seed))
        options += ("--execute", "1", "--json", str(out / f"{process}.json"))
        options += ("--figures", str(out / "figures" / process))
        found.append(Stage(f"evaluate {process}", "evaluate", options))
    both = ("--checkpoint", str(out / "flow"), str(out / "regression"), "--seed", str(args.seed))
    found.append(Stage("sample side by side", "sample", (*both, "--out", str(out / "figures" / "fan.png"))))
    return found


def run_stage(stage: Stage, done: Path, compiled: Path) -> None:
    """Runs a stage unless the same command has succeeded before. Raises ValueError where it fails.

    Stages share the programs that they compile (in `compiled`, unless the environment names another place).
    """
    if done.exists() and done.read_text() == stage.typed():
        print("  already done", flush=True)
        return
    print(f"  $ {stage.typed()}", flush=True)
    start = time.monotonic()
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(compiled.absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    finished = subprocess.run([*program(stage.command), *stage.options], env=cache | os.environ, check=False)
    if finished.returncode:
        raise ValueError(f"the stage '{stage.name}' failed; the same command goes on from there")
    done.parent.mkdir(parents=True, exist_ok=True)
    part = done.with_suffix(".part")
    part.write_text(stage.typed())
    os.replace(part, done)
    print(f"  {time.monotonic() - start:.0f} s", flush=True)


def program(command: str) -> list[str]:
    """What runs a command, from a checkout or installed, with this very interpreter."""
    return [sys.executable, "-m", "vla_jax.cli", command]


def write_results(out: Path) -> str:
    """Draws the training curves and writes RESULT.md; returns its table."""
    from vla_jax.files import read_json
    from vla_jax.sim.figures import curves, style
    from vla_jax.sim.figures.table import markdown_table

    names = ("flow", "regression")
    again = "remove it and its mark in done/, and run the same command again"
    reports = {name: read_json(out / f"{name}.json", mend=again) for name in names}
    runs = {name: curves.read_metrics(out / name) for name in names}
    style.save(
        curves.draw_curves(runs, title="Training: flow and regression"), out / "figures" / "curves.png"
    )
    table = markdown_table(reports)
    pictures = ("fan.png", "curves.png", *(f"{name}/rollouts.png" for name in names))
    lines = [
        "# Quickstart: flow against regression on the tabletop",
        "",
        "Same data, backbone and budget; 95 % intervals in brackets.",
        "",
        table,
        *(f"![{name}](figures/{name})" for name in pictures),
        "",
    ]
    part = out / ".RESULT.md.part"
    part.write_text("\n".join(lines))
    os.replace(part, out / "RESULT.md")
    return table


def main() -> None:
    """Parses the command line and runs what is missing."""
    args = cli(QuickstartArgs, description=__doc__)
    find_config(args.config)  # an error now, not after the demonstrations
    if args.fast and args.out == Path("runs/quickstart"):
        args = dataclasses.replace(args, out=Path("runs/quickstart-fast"))
    start, todo = time.monotonic(), stages(args)
    for number, stage in enumerate(todo, 1):
        print(f"[{number}/{len(todo) + 1}] {stage.name}", flush=True)
        done = args.out / "stages" / f"{number}-{stage.name.replace(' ', '-')}"
        run_stage(stage, done, args.out / "compiled")
    print(f"[{len(todo) + 1}/{len(todo) + 1}] table and training curves", flush=True)
    print("\n" + write_results(args.out))
    print(
        f"{args.out / 'RESULT.md'} and {args.out / 'figures'}, {(time.monotonic() - start) / 60:.1f} minutes"
    )
