"""A whole sweep: which cells are left, in which groups, trained and judged one group after the other."""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from vla_jax.checkpoint import Checkpoints
from vla_jax.checkpoint.manager import versions
from vla_jax.config import config_hash, to_json
from vla_jax.finite import finite
from vla_jax.lab.evaluate import closed_loop, last_validation
from vla_jax.lab.grid import Cell
from vla_jax.lab.plan import Group, plan, split
from vla_jax.lab.store import Store
from vla_jax.lab.together import pick
from vla_jax.lab.train import Interrupted, compile_step, make_group_job, train_group
from vla_jax.serve.policy import Policy
from vla_jax.sharding.report import human
from vla_jax.train.loop import TrainingDiverged
from vla_jax.train.run import resolve, train


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class SweepConfig:
    """How cells are trained and judged; it changes no cell's parameters."""

    group: int | None = None
    """Most cells in one program; 1: one after another, each as launch.train does it. None: as many as can be."""
    max_memory: float | None = None
    """GiB that a program may need on each device, by the compiler's account: decides the size of the groups."""
    episodes: int = 64
    """Held-out episodes on the tabletop per cell, as many again with swapped instructions; 0: losses only."""
    keep_policies: bool = False
    """Keep every cell's parameters as a checkpoint in its directory, for launch.evaluate."""

    def __post_init__(self):
        if self.group is not None and self.group < 1:
            raise ValueError(f"--group {self.group}: at least 1 cell")
        if self.max_memory is not None and self.max_memory <= 0:
            raise ValueError(f"--max-memory {self.max_memory}: must be above 0 GiB")
        if self.episodes < 0:
            raise ValueError(f"--episodes {self.episodes}: must not be negative")

    @property
    def evaluation(self) -> dict[str, Any]:
        """What a result depends on besides the cell's configuration."""
        return {"episodes": self.episodes}


def sweep(
    cells: Sequence[Cell],
    store: Store,
    config: SweepConfig,
    asked: dict[str, Any],
    *,
    only: str | None = None,
) -> None:
    """Trains and judges all cells that are not finished; raises ValueError, OSError, Interrupted.

    `asked` is what the user wrote, for sweep.json. With `only` it is one cell's own process, of many at a time.
    """
    check(cells)
    if only is not None:
        cells = [cell for cell in cells if cell.name == only]
        if not cells:
            raise ValueError(f"--cell {only}: the sweep has no such cell; --dry-run lists them")
    with store.lock("sweep" if only is None else only):
        left = [cell for cell in cells if not store.is_finished(cell, config.evaluation)]
        if only is None:
            record(cells, store, asked)
        say(f"{store.root}: {len(cells)} cells, {len(cells) - len(left)} of them finished")
        store.begin(left)
        names = {cell.name for cell in left}
        begun = [g for g in store.begun_groups(cells) if any(c.name in names for c in g.cells)]
        taken = {cell.name for group in begun for cell in group.cells}
        for group in begun:
            run_group(group, store, config)
        for group in plan([cell for cell in left if cell.name not in taken]):
            run_program(group, store, config)


def record(cells: Sequence[Cell], store: Store, asked: dict[str, Any]) -> None:
    """Notes in sweep.json what is asked for."""
    store.ask(asked | {"cells": [cell.name for cell in cells], "versions": versions()})


def check(cells: Sequence[Cell]) -> None:
    """Raises ValueError where cells could not be judged."""
    for cell in cells:
        loop = cell.config.train
        if not loop.val_every or not loop.val_batches:
            raise ValueError(
                "train.val_every=0: cells are compared by their losses on held-out episodes; set it to train.steps"
            )


def run_program(group: Group, store: Store, config: SweepConfig) -> None:
    """All cells of one program, in groups as large as they may be."""
    most = len(group.cells) if config.group is None else config.group
    if config.max_memory is not None and most > 1:
        most = min(most, most_in_memory(group, config.max_memory * 2**30))
    for part in split(group, most):
        run_group(part, store, config)


def most_in_memory(group: Group, limit: float) -> int:
    """How many cells fit into `limit` bytes per device, by the needs of one and of two per device."""
    devices = len(jax.devices())
    one, two = (compile_step(make_group_job(Group(group.cells[:cells]))).memory for cells in (1, devices + 1))
    each = max(1, 1 + int((limit - one) / max(two - one, 1)))
    say(f"one cell needs {human(one)}, each further one {human(two - one)}: {each} per device")
    return 1 if one > limit else each * devices


def run_group(group: Group, store: Store, config: SweepConfig) -> None:
    """Trains a group and judges each of its cells."""
    if len(group.cells) == 1:
        return run_alone(group.cells[0], store, config)
    begin = time.perf_counter()
    job = make_group_job(group)
    trained = train_group(job, store.begin_group(group), store.cell)
    params = trained.state.params if trained.state.ema is None else trained.state.ema
    say(f"{len(group.cells)} cells trained in {time.perf_counter() - begin:.0f} s")
    for i, cell in enumerate(group.cells):
        if store.is_finished(cell, config.evaluation):
            continue
        policy = Policy(
            config=resolve(cell.config, job.bundle),
            bundle=job.bundle,
            params=pick(params, i),
            step=int(trained.state.step),
        )
        if config.keep_policies:
            _save(policy, store.cell(cell.name))
        training = {"skipped": int(trained.skipped[i]), "diverged": bool(trained.diverged[i])}
        judge(cell, policy, store, config, training | {"together": len(group.cells)})
    store.end_group(group)


def run_alone(cell: Cell, store: Store, config: SweepConfig) -> None:
    """One cell as launch.train trains it, on all devices and with its own mesh."""
    folder, diverged = store.cell(cell.name), False
    try:
        train(cell.config, folder)
    except TrainingDiverged as error:  # a result like any other: the cells after it are still to come
        say(f"{cell.name}: {error}")
        diverged = True
    if jax.process_index():
        return
    policy = Policy.load(folder)
    if policy.step < cell.config.train.steps and not diverged:
        raise Interrupted(f"stopped and saved at step {policy.step} of {cell.config.train.steps}")
    judge(cell, policy, store, config, {"skipped": None, "diverged": diverged, "together": 1})
    if not config.keep_policies:
        shutil.rmtree(folder / "checkpoints")


def judge(cell: Cell, policy: Policy, store: Store, config: SweepConfig, training: dict[str, Any]) -> None:
    """Measures a trained cell and writes its result."""
    result = {
        "cell": cell.name,
        "values": cell.values,
        "config_hash": config_hash(cell.config),
        "evaluation": config.evaluation,
        "step": policy.step,
        **training,
        "val": last_validation(store.cell(cell.name), policy.step, missing=training["diverged"]),
        "closed_loop": closed_loop(policy, config.episodes),
        "versions": versions(),
    }
    store.finish(cell, result)
    say(f"{cell.name}: {summary(result)}")


def summary(result: dict[str, Any]) -> str:
    """A result in a line."""
    val, loop = result["val"], result["closed_loop"] or {}
    told = ("text_loss", "action_loss")
    shown = {
        "CE": val.get("text_loss"),
        "action loss": val.get("action_loss"),
        **{name: value for name, value in sorted(val.items()) if name.endswith("_loss") and name not in told},
        "success": loop.get("success"),
    }
    text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
    return f"{text}  diverged" if result["diverged"] else text


def say(line: str) -> None:
    """Tells the user; results go to files."""
    print(line, file=sys.stderr, flush=True)


def _save(policy: Policy, folder: Path) -> None:
    """The parameters as a checkpoint that launch.evaluate reads."""
    meta = {
        "config": json.loads(to_json(policy.config)),
        "config_hash": policy.config_hash,
        "data": policy.bundle.to_json(),
    }
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(policy.step, {"params": policy.params}, meta)
    checkpoints.close()
