"""What a run writes down: two JSON-lines files and, where asked for, TensorBoard and Weights & Biases.

- ``metrics.jsonl`` holds what is determined by config and data: an interrupted and continued run writes the same
  bytes as an uninterrupted one. Lines later than the restored step are cut off on resuming.
- ``perf.jsonl`` holds timings, which are nobody's business to reproduce.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from vla_jax.checkpoint.paths import Path, is_remote, run_path, write_atomically

Values = Mapping[str, Any]


class Writer(Protocol):
    """Somewhere that metrics go."""

    def write(self, step: int, values: Values) -> None:
        """Takes scalars and short vectors."""

    def close(self) -> None:
        """Writes out what is still buffered."""


class JsonLines:
    """One JSON object per line, the step first."""

    def __init__(self, path: Path):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, values: Values) -> None:
        """Appends a line; non-finite numbers, which JSON does not have, become null."""
        self._file.write(json.dumps({"step": step} | {k: _plain(v) for k, v in values.items()}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns once everything written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes."""
        self.sync()
        self._file.close()


class RemoteJsonLines:
    """The same on an object store, where nothing can be appended: the whole is written anew with every `sync`."""

    def __init__(self, path: Path):
        self._path = path
        self._lines = [path.read_text()] if path.exists() else []

    def write(self, step: int, values: Values) -> None:
        """Remembers a line."""
        self._lines.append(json.dumps({"step": step} | {k: _plain(v) for k, v in values.items()}) + "\n")

    def sync(self) -> None:
        """Uploads all lines."""
        self._path.write_text("".join(self._lines))

    def close(self) -> None:
        """Syncs."""
        self.sync()


class TensorBoard:
    """Event files; a vector becomes one curve per element."""

    def __init__(self, folder: Path, start: int):
        import tensorboardX  # writing events is its only use

        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, step: int, values: Values) -> None:
        """Adds a point to each curve."""
        for name, value in _scalars(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what is still buffered."""
        self._writer.close()


class Wandb:
    """Weights & Biases; the run's directory, with all that is above it, is the run: continuing it continues there."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]):
        try:
            import wandb  # an extra
        except ImportError as error:
            raise ValueError(
                "train.wandb=True, but wandb is not installed: pip install 'vla_jax[wandb]', or train.wandb=False"
            ) from error
        self._run = wandb.init(
            project="vla_jax",
            name=run_dir.name,
            id=f"{run_dir.name}-{hashlib.sha256(os.fspath(run_path(run_dir)).encode()).hexdigest()[:12]}",
            resume="allow",
            dir=run_dir,
            config=dict(config),
        )

    def write(self, step: int, values: Values) -> None:
        """Logs one step."""
        self._run.log(_scalars(values), step=step)

    def close(self) -> None:
        """Finishes the upload."""
        self._run.finish()


class MetricsLog:
    """All writers of a run. On hosts other than the first it writes nothing."""

    def __init__(
        self, run_dir: Path, *, start: int, tensorboard: bool, wandb: bool, config: Mapping[str, Any]
    ):
        self._metrics: JsonLines | RemoteJsonLines | None = None
        self._perf: JsonLines | RemoteJsonLines | None = None
        self._others: list[Writer] = []
        if jax.process_index():
            return
        if wandb:
            self._others.append(Wandb(run_dir, config))
        if tensorboard:
            self._others.append(TensorBoard(run_dir / "tensorboard", start))
        lines = RemoteJsonLines if is_remote(run_dir) else JsonLines
        truncate(run_dir / "metrics.jsonl", start)
        self._metrics = lines(run_dir / "metrics.jsonl")
        self._perf = lines(run_dir / "perf.jsonl")

    def metrics(self, step: int, values: Values) -> None:
        """Values that are determined by config and data."""
        self._write(self._metrics, step, values)

    def perf(self, step: int, values: Values) -> None:
        """Timings."""
        self._write(self._perf, step, {f"perf/{name}": value for name, value in values.items()})

    def sync(self) -> None:
        """Call it before a checkpoint is saved: a checkpoint's metrics must outlive a crash."""
        for lines in (self._metrics, self._perf):
            if lines is not None:
                lines.sync()

    def close(self) -> None:
        """Closes every writer."""
        for writer in (self._metrics, self._perf, *self._others):
            if writer is not None:
                writer.close()

    def _write(self, lines: JsonLines | RemoteJsonLines | None, step: int, values: Values) -> None:
        if lines is not None:
            lines.write(step, values)
            for writer in self._others:
                writer.write(step, values)


def truncate(path: Path, step: int) -> None:
    """Cuts a JSON-lines file off after the last line of `step`, or at a line that was not finished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(line)
    write_atomically(path, "".join(kept))


def _plain(value: Any) -> Any:
    array = np.asarray(value)
    if array.ndim:
        return [_plain(v) for v in array]
    number = array.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _scalars(values: Values) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        array = np.asarray(value)
        if array.ndim:
            flat |= {f"{name}/{i}": float(v) for i, v in enumerate(array)}
        else:
            flat[name] = float(array)
    return flat
