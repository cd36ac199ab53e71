"""What a run writes down: two JSON-lines files and, where asked for, TensorBoard and Weights & Biases.

- ``metrics.jsonl`` holds what is determined by config and data: an interrupted and continued run writes the same
  bytes as an uninterrupted one. Lines later than the restored step are cut off on resuming.
- ``perf.jsonl`` holds timings, which are nobody's business to reproduce.
"""

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from vla_jax.checkpoint.paths import Path, is_remote, run_path, write_atomically
from vla_jax.files import json_lines, name_lines, warn

Values = Mapping[str, Any]


class Writer(Protocol):
    """A destination of metrics: a file, TensorBoard, Weights & Biases."""

    def write(self, step: int, values: Values) -> None:
        """Takes scalars and short vectors."""

    def close(self) -> None:
        """Writes out what is still buffered."""


class Written:
    """How many lines a file has, and their hash: checkpoints keep it, so that what is lost or changed later is seen."""

    def __init__(self):
        self._lines, self._hash = 0, hashlib.sha256()

    @classmethod
    def of(cls, data: bytes) -> "Written":
        """Of what a file holds."""
        written = cls()
        written.add(data.decode(errors="surrogateescape"))
        return written

    def add(self, text: str) -> None:
        """Counts whole lines that are appended."""
        self._lines += text.count("\n")
        self._hash.update(text.encode(errors="surrogateescape"))

    def to_json(self) -> dict[str, Any]:
        """Number of lines and their hash, for a checkpoint's metadata."""
        return {"lines": self._lines, "sha256": self._hash.hexdigest()}


class JsonLines:
    """One JSON object per line, the step first."""

    def __init__(self, path: Path | pathlib.Path):
        self.written = Written.of(path.read_bytes() if path.exists() else b"")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, values: Values) -> None:
        """Appends a line; non-finite numbers, which JSON does not have, become null."""
        line = json.dumps({"step": step} | {k: _plain(v) for k, v in values.items()}) + "\n"
        self._file.write(line)
        self._file.flush()
        self.written.add(line)

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
        self.written = Written.of("".join(self._lines).encode())

    def write(self, step: int, values: Values) -> None:
        """Remembers a line."""
        self._lines.append(json.dumps({"step": step} | {k: _plain(v) for k, v in values.items()}) + "\n")
        self.written.add(self._lines[-1])

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
        self,
        run_dir: Path,
        *,
        start: int,
        tensorboard: bool,
        wandb: bool,
        config: Mapping[str, Any],
        written: Mapping[str, Any] | None = None,
    ):
        """`written`: what metrics.jsonl held at the step `start`, by the checkpoint (`MetricsLog.written`)."""
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
        truncate(run_dir / "metrics.jsonl", start, written)
        self._metrics = lines(run_dir / "metrics.jsonl")
        self._perf = lines(run_dir / "perf.jsonl")

    def metrics(self, step: int, values: Values) -> None:
        """Values that are determined by config and data."""
        self._write(self._metrics, step, values)

    def perf(self, step: int, values: Values) -> None:
        """Timings, into perf.jsonl: metrics.jsonl holds only what config and data determine."""
        self._write(self._perf, step, {f"perf/{name}": value for name, value in values.items()})

    def written(self) -> dict[str, Any] | None:
        """What metrics.jsonl holds by now; None in processes that write nothing."""
        return None if self._metrics is None else self._metrics.written.to_json()

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


def truncate(path: Path | pathlib.Path, step: int, written: Mapping[str, Any] | None = None) -> None:
    """Leaves out what a JSON-lines file has of steps after `step`, and what is damaged.

    Damage among the lines that stay is warned of; so is, by what the checkpoint says was `written`, a line that is
    missing or changed. The torn end of a run that was killed is of later steps, and nothing is said of it.
    """
    if not path.exists():
        if step:
            warn(f"{path} is not there: what was logged until step {step} is lost")
        return
    kept, damaged, last = [], [], 0
    for number, line, values in json_lines(path):
        if values is None:
            damaged.append(number)
        elif values["step"] <= step:
            kept.append(line)
            last = number
    content = b"".join(kept)
    found, damaged = Written.of(content).to_json(), [number for number in damaged if number < last]
    problems = [f"{name_lines(damaged)} damaged and left out"] if damaged else []
    if written is not None and found["lines"] != written["lines"]:
        problems.append(f"{found['lines']} of the {written['lines']} lines until step {step} are there")
    elif written is not None and found != dict(written):
        problems.append(f"a line until step {step} is not what was written")
    if problems:
        warn(f"{path}: {'; '.join(problems)}")
    write_atomically(path, content.decode())


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
