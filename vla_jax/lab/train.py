"""Trains a group of cells in one program, or one cell as launch.train would."""

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vla_jax.checkpoint import Checkpoints
from vla_jax.config import TrainConfig, to_json
from vla_jax.data.bundle import DataBundle
from vla_jax.data.index import index_dataset
from vla_jax.data.normalize import narrow_dims
from vla_jax.flow.processes import make_process
from vla_jax.lab.plan import Group
from vla_jax.lab.together import Cells, CompiledStep, Together, padding
from vla_jax.layers.attention import check_backend
from vla_jax.models.vla import VLA
from vla_jax.train.cluster.hosts import bundle_hash
from vla_jax.train.cluster.interrupt import StopSignal
from vla_jax.train.loop import FREE_TO_CHANGE
from vla_jax.train.metrics import JsonLines, truncate
from vla_jax.train.optim import learning_rate, make_optimizer
from vla_jax.train.parts import init_params
from vla_jax.train.prefetch import Prefetch
from vla_jax.train.run import check_trunks, loader_of, prepare_data, resolve
from vla_jax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupJob:
    """What a group needs to be trained, from its data set."""

    group: Group
    config: TrainConfig
    """Resolved."""
    bundle: DataBundle
    together: Together
    batches: Callable[[int], Iterator[Batch]]
    val_batches: Callable[[], Iterator[Batch]]
    example: Batch
    data_fingerprint: str


class Interrupted(Exception):
    """The process was asked to stop; everything is saved."""


def _refuse_fine_tuning(config: TrainConfig) -> None:
    """Cells start from drawn parameters, and train all of them."""
    unused = {
        "train.init_from": config.train.init_from,
        "optim.freeze": config.optim.freeze,
        "lora.rank": config.lora.rank,
    }
    for name, value in unused.items():
        if value:
            raise ValueError(f"cells that are trained together do not know {name}={value}; use --group 1")


def make_group_job(group: Group) -> GroupJob:
    """Reads the data set of the group's configuration. Raises ValueError where it does not fit."""
    if jax.process_count() > 1:
        raise ValueError(
            "cells are trained together on one host only; use --group 1, or --submit for a job per cell"
        )
    _refuse_fine_tuning(group.config)
    if group.config.model.attention == "cudnn":
        raise ValueError(
            "model.attention=cudnn has no gradient where models are trained together (its backward pass cannot be "
            "mapped over them in JAX); use --group 1, or --model.attention xla"
        )
    check_backend(group.config.model.attention, jax.devices()[0].platform)
    bundle = prepare_data(group.config)
    print("".join(f"note: {line}\n" for line in bundle.constant_dims), end="")
    config = resolve(group.config, bundle)
    loader, held_out = (loader_of(config, bundle, split) for split in ("train", "val"))
    example = loader.example_batch()
    devices = tuple(jax.devices())
    together = Together(
        model=VLA(config.model),
        process=make_process(config.process),
        config=config,
        tx=make_optimizer(config.optim, config.train.steps),
        init_params=init_params(VLA(config.model), example),
        knobs=group.knobs(padding(len(group.cells), devices)),
        devices=devices,
    )
    check_trunks(config.objective, together.shapes.state.params)
    return GroupJob(
        group=group,
        config=config,
        bundle=bundle,
        together=together,
        batches=loader.iterate,
        val_batches=lambda: (held_out.batch(i) for i in range(config.train.val_batches)),
        example=example,
        data_fingerprint=index_dataset(loader.source).fingerprint,
    )


def train_group(job: GroupJob, folder: Path, cell_dir: Callable[[str], Path]) -> Cells:
    """Trains until the last step, from the newest checkpoint in `folder` on; raises Interrupted.

    Each cell's metrics.jsonl holds what launch.train would write, the same bytes however often it was interrupted.
    """
    loop, together = job.config.train, job.together
    meta = {
        "config": json.loads(to_json(job.config)),
        "cells": [cell.name for cell in job.group.cells],
        "cells_with_padding": len(together.knobs.seed),  # a multiple of the number of devices
        "data_fingerprint": job.data_fingerprint,
        # A sweep that was begun when scales had no least value is the same one where no scale is that small.
        "narrow_dims": list(narrow_dims(job.bundle.normalize, job.bundle.schema)) or None,
        "prepared": dict(bundle_hash(job.bundle).parts),
    }

    def identity(saved: Mapping[str, Any]) -> dict[str, Any]:
        return {key: saved.get(key) for key in meta} | {"prepared": saved.get("prepared", meta["prepared"])}

    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(folder, keep=1)
        stack.callback(checkpoints.close)
        restored = checkpoints.restore_latest(
            together.shapes.items(), same=meta, identity=identity, free=FREE_TO_CHANGE
        )
        start, written = (restored.step, restored.meta.get("metrics")) if restored else (0, None)
        if restored:
            step = jax.device_put(jax.numpy.int32(start), together.everywhere)
            cells = Cells.from_items(step, restored.items)
        else:
            cells = together.init()
        if start >= loop.steps:
            return cells
        compiled = compile_step(job)
        log = stack.enter_context(contextlib.closing(_Log(job, cell_dir, start, written)))
        batches = stack.enter_context(Prefetch(job.batches(start), together.everywhere))
        stop = stack.enter_context(StopSignal())
        step = start
        for step, batch in zip(itertools.count(start + 1), batches):
            cells, metrics = compiled(cells, batch)
            if step % loop.log_every == 0:
                log.training(step, metrics)
            last = step == loop.steps or stop.requested
            if loop.val_every and (step % loop.val_every == 0 or step == loop.steps):
                params = cells.state.params if cells.state.ema is None else cells.state.ema
                with Prefetch(job.val_batches(), together.everywhere) as held_out:
                    log.validation(step, together.validate(params, held_out))
            if step % loop.save_every == 0 or last:
                log.sync()
                checkpoints.save(step, cells.items(), meta | {"metrics": log.written()})
            if last:
                break
    if step < loop.steps:
        raise Interrupted(f"stopped and saved at step {step} of {loop.steps}; the same command goes on")
    return cells


def compile_step(job: GroupJob) -> CompiledStep:
    """The compiled step of a group."""
    begin = time.perf_counter()
    _say(f"compiling {len(job.group.cells)} cells as one program; nothing else is said until that is done …")
    batch = jax.device_put(job.example, job.together.everywhere)
    compiled = job.together.compile_step(batch)
    _say(f"compiled {len(job.group.cells)} cells as one program in {time.perf_counter() - begin:.1f} s")
    return compiled


class _Log:
    """Every cell's metrics.jsonl, and a line on the terminal now and then."""

    def __init__(self, job: GroupJob, cell_dir: Callable[[str], Path], start: int, written: list | None):
        paths = [cell_dir(cell.name) / "metrics.jsonl" for cell in job.group.cells]
        for path, held in zip(paths, written or [None] * len(paths), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            truncate(path, start, held)
        self._files = [JsonLines(path) for path in paths]
        self._rates = job.together.knobs.learning_rate
        self._schedule = learning_rate(job.config.optim, job.config.train.steps)
        self._steps, self._start, self._begin = job.config.train.steps, start, time.perf_counter()
        self._said = self._begin

    def training(self, step: int, metrics: dict[str, Any]) -> None:
        """Metrics of a step, [cells …]."""
        rate = float(jax.device_get(self._schedule(step - 1)))
        metrics = jax.device_get(metrics)
        for i, file in enumerate(self._files):
            own = {name: value[i] for name, value in metrics.items()}
            file.write(step, own | {"learning_rate": np.float32(rate) * self._rates[i]})
        now = time.perf_counter()
        if now - self._said > 10:
            self._said = now
            each = (now - self._begin) / (step - self._start)
            _say(f"step {step}/{self._steps}, {1e3 * each:.0f} ms for {len(self._files)} cells")

    def validation(self, step: int, metrics: dict[str, Any]) -> None:
        """Metrics of a validation, [cells …]."""
        metrics = jax.device_get(metrics)
        for i, file in enumerate(self._files):
            file.write(step, {f"val/{name}": value[i] for name, value in metrics.items()})

    def written(self) -> list[dict[str, Any]]:
        """What every file holds by now."""
        return [file.written.to_json() for file in self._files]

    def sync(self) -> None:
        """Before a checkpoint: its metrics must outlive a crash."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """Closes all files."""
        for file in self._files:
            file.close()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
