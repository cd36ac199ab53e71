"""What launch.evaluate and launch.sample share: the policy's environment and solver, progress, files."""

import dataclasses
import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import tqdm

from vla_jax.cli.arguments import EvaluateArgs, SampleArgs
from vla_jax.files import write_json
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.policy import Policy
from vla_jax.sim.evaluate import EvaluateConfig, Evaluation, Progress
from vla_jax.sim.evaluate_tabletop import evaluate_tabletop
from vla_jax.sim.figures import curves, fan, sheet, style
from vla_jax.sim.figures.table import markdown_table
from vla_jax.sim.pictures import fan_rows, films
from vla_jax.sim.tabletop import TabletopConfig, TabletopEnv

WITHOUT_SOLVER = ("regression", "tokens")
"""Kinds of policies that predict without integrating anything."""


def evaluate(args: EvaluateArgs) -> None:
    """Evaluates, prints the table, writes JSON and pictures."""
    for path in (args.json, args.figures):
        if path is not None:
            check_writable(path)
    policy = Policy.load(args.checkpoint, weights=args.weights, batch_size=args.batch_size)
    tokens = policy.config.kind == "tokens"
    if args.temperature is not None and not (tokens or args.plan_visible):
        raise ValueError(
            f"--temperature does not apply: a policy of kind {policy.config.kind} writes nothing but plans; add "
            "--plan-visible, or leave it out"
        )
    solver = solver_of(policy, args.solver, args.num_steps, args.temperature if tokens else None)
    kind, tasks = environment_of(policy, args.env)
    config = EvaluateConfig(
        episodes=args.episodes,
        seed=args.seed,
        execute=args.execute,
        plan_visible=args.plan_visible,
        temperature=args.temperature or 0.0,
        executor=args.executor,
        delay=args.delay,
        overlap=args.overlap,
        guidance=args.guidance,
    )
    with progress_bars() as progress:
        if kind == "tabletop":
            evaluation = evaluate_tabletop(
                policy, config, solver, env_config=tabletop_of(policy), progress=progress
            )
        else:
            from vla_jax.sim.evaluate_metaworld import evaluate_metaworld  # needs the extra `sim`

            evaluation = evaluate_metaworld(
                policy, tasks, config, solver, image_size=camera_size(policy, "corner2"), progress=progress
            )
    report: dict[str, Any] = evaluation.report | {"step": policy.step}
    report["config"] |= {"env": ":".join([kind, ",".join(tasks)]).rstrip(":"), "policy": policy.config_hash}
    if policy.config.kind in WITHOUT_SOLVER:
        report["solver"] = None
    if tokens:
        report["config"]["temperature"] = solver.temperature
    name = label_of(args.checkpoint)
    print(f"{args.checkpoint}, step {policy.step}, {policy.config.kind}, {report['config']['env']}\n")
    print(markdown_table({name: report}), end="")
    if args.json is not None:
        write_json(report, args.json)
        print(f"\nwrote {args.json}")
    if args.figures is not None:
        for path in draw(
            args, args.figures, policy, solver, kind, Evaluation(report=report, rollout=evaluation.rollout)
        ):
            print(f"wrote {path}")


def draw(
    args: EvaluateArgs,
    folder: Path,
    policy: Policy,
    solver: SolverConfig,
    kind: str,
    evaluation: Evaluation,
) -> list[Path]:
    """Draws rollouts and, where they apply, fans and training curves; returns the files."""
    report, name = evaluation.report, label_of(args.checkpoint)
    title = f"{name}: {100 * report['success']:.1f} % success in {report['episodes']} episodes"
    paths = [
        style.save(
            sheet.draw_sheet(films(evaluation.rollout.recordings), title=title), folder / "rollouts.png"
        )
    ]
    if kind == "tabletop":
        seeds = EvaluateConfig(episodes=2, seed=args.seed).seeds()
        key = jax.random.key(args.seed)
        rows = fan_rows({name: policy}, seeds, key, solver=solver, env_config=tabletop_of(policy))
        figure = fan.draw_fans([[row[0] for row in rows]], title="Chunks sampled in symmetric scenes")
        paths.append(style.save(figure, folder / "fan.png"))
    run_dir = run_of(args.checkpoint)
    if run_dir is not None:
        figure = curves.draw_curves({name: curves.read_metrics(run_dir)}, title=f"{name}: training")
        paths.append(style.save(figure, folder / "curves.png"))
    return paths


def sample(args: SampleArgs) -> None:
    """Prints instructions and plans, and draws the fans."""
    if args.out is not None:
        check_writable(args.out)
    policies = {}
    for path in args.checkpoint:
        policy = Policy.load(path)
        environment_of(policy, "tabletop")
        policies[unique_label(path, policy, policies)] = policy
    seeds = EvaluateConfig(episodes=args.scenes, seed=args.seed).seeds()
    key = jax.random.key(args.seed)
    columns = []
    for label, policy in policies.items():
        # A solver does not apply to regression; it is meant for the others then.
        asked = (None, None) if policy.config.kind in WITHOUT_SOLVER else (args.solver, args.num_steps)
        config = tabletop_of(policy)
        if policy.writes_plans:
            observation = TabletopEnv(config, kind="symmetric").reset(seeds)
            for instruction, text in zip(
                observation.instruction, policy.plan(observation, key, args.temperature)
            ):
                print(f"{label}: “{instruction}” → “{' '.join(text.split())}”")
        rows = fan_rows(
            {label: policy},
            seeds,
            key,
            solver=solver_of(policy, *asked),
            samples=args.samples,
            plan=args.plan,
            env_config=config,
        )
        columns.append([row[0] for row in rows])
        print(*(f"{label}: {' '.join(row[0].caption.split())}" for row in rows), sep="\n")
    if args.out is not None:
        title = f"{args.samples} chunks sampled per scene" + (f", told to “{args.plan}”" if args.plan else "")
        style.save(fan.draw_fans([list(row) for row in zip(*columns)], title=title), args.out)
        print(f"wrote {args.out}")


def unique_label(path: Path, policy: Policy, taken: Container[str]) -> str:
    """The process's name, or the run's where two policies have the same process."""
    kind = policy.config.kind
    label = kind if kind not in taken else label_of(path)
    if label in taken:
        raise ValueError(f"--checkpoint {path} is given twice")
    return label


def solver_of(
    policy: Policy, method: str | None, num_steps: int | None, temperature: float | None = None
) -> SolverConfig:
    """The training configuration's solver with what was asked for changed."""
    kind = policy.config.kind
    changes = {"method": method, "num_steps": num_steps, "temperature": temperature}
    changes = {field: value for field, value in changes.items() if value is not None}
    if kind in WITHOUT_SOLVER and (method or num_steps):
        option = "--solver" if method else "--num-steps"
        how = "by regression" if kind == "regression" else "to write tokens"
        raise ValueError(f"{option} does not apply: the policy was trained {how}, which has no solver")
    return dataclasses.replace(policy.config.solver, **changes)


def environment_of(policy: Policy, env: str | None) -> tuple[str, tuple[str, ...]]:
    """tabletop or metaworld, and the tasks of the latter; by default those of the training data."""
    schema = policy.bundle.schema
    kind, _, rest = (env or schema.robot).partition(":")
    tasks = tuple(task.strip() for task in rest.split(",")) if rest else ()
    if kind not in ("tabletop", "metaworld") or (kind == "tabletop" and tasks):
        asked = (
            f"--env {env!r} is unknown"
            if env
            else f"the policy's robot {schema.robot!r} is not simulated here"
        )
        raise ValueError(f"{asked}; use tabletop or metaworld:TASK,TASK,…")
    if kind != schema.robot:
        raise ValueError(
            f"--env {env}: the policy was trained for {schema.robot}, with other cameras and actions"
        )
    if kind == "metaworld" and not tasks:
        tasks = tuple(sorted(task for task in policy.bundle.normalize.statistics if task))
        if not tasks:
            raise ValueError("the checkpoint does not name its tasks; give --env metaworld:TASK,TASK,…")
    return kind, tasks


def tabletop_of(policy: Policy) -> TabletopConfig:
    """The tabletop at the resolution of the policy's data."""
    return TabletopConfig(image_size=camera_size(policy, "top"))


def camera_size(policy: Policy, camera: str) -> int:
    """Pixels of a square camera of the policy's data."""
    cameras = policy.bundle.schema.cameras
    if camera not in cameras:
        raise ValueError(
            f"the policy's data has cameras {', '.join(cameras)}, this environment has {camera!r}"
        )
    return cameras[camera][0]


def label_of(checkpoint: Path) -> str:
    """A name for a checkpoint: its run's directory."""
    run_dir = run_of(checkpoint)
    return (run_dir or checkpoint).absolute().name


def run_of(checkpoint: Path) -> Path | None:
    """The run directory of a checkpoint, if there is one around it."""
    candidates = [checkpoint, *list(checkpoint.absolute().parents)[:2]]
    return next((path for path in candidates if (path / "metrics.jsonl").exists()), None)


def check_writable(path: Path) -> None:
    """Raises OSError now rather than after the evaluation."""
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission in {parent}")


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """One bar for each kind of episodes, one after the other."""
    bar = tqdm.tqdm(disable=True)

    def progress(name: str, total: int, ended: int) -> None:
        nonlocal bar
        if bar.disable or bar.desc != name:
            bar.close()
            bar = tqdm.tqdm(unit="episode", total=0)
            bar.desc = name
        if bar.n == bar.total:  # the first piece, or the next one of the same kind
            bar.total += total
        bar.update(ended)

    try:
        yield progress
    finally:
        bar.close()
