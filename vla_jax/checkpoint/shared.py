"""Whether all processes mean the same run directory: each would otherwise keep its part of a checkpoint to itself."""

import contextlib
import json
import os
import socket
import time
import uuid

from vla_jax.checkpoint.paths import Path, is_remote, run_path
from vla_jax.sharding import distributed

PATIENCE = 5.0
"""Seconds until what process 0 has written counts as not there: file systems over a network may be late."""


def make_shared(run_dir: str | os.PathLike) -> Path:
    """The run's directory, made where it is not there; all processes call it.

    Raises ValueError, on every process, where one of them does not find there what process 0 has written. What this
    has made is then taken away again.
    """
    run_dir = run_path(run_dir)
    made = _make(run_dir)
    if distributed.process_count() == 1:
        return run_dir
    mark = run_dir / f".shared-{uuid.uuid4().hex}"
    if not distributed.process_index():
        mark.write_text(mark.name)
    name = distributed.gather("mark of the run directory", mark.name)[0]
    try:
        found = _finds(run_dir / name)
        answers = distributed.gather("run directory", json.dumps([found, socket.gethostname(), str(run_dir)]))
    finally:
        if not distributed.process_index():
            mark.unlink()
    (_, host, path), *others = map(json.loads, answers)
    for i, (found, other_host, other_path) in enumerate(others, 1):
        if found:
            continue
        distributed.barrier("the mark is taken away")
        _take_away(made)
        raise ValueError(
            f"process {i} ({other_host}) does not find in its run directory {other_path} what process 0 ({host}) has "
            f"written to {path}; --run-dir must be one directory that all hosts share"
        )
    return run_dir


def _make(folder: Path) -> list[Path]:
    """Makes a directory; returns which ones were not there, the innermost first."""
    made = [] if is_remote(folder) else [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
        raise OSError(f"the run directory {folder} cannot be made ({reason}); use another one") from error
    return made


def _take_away(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # another process has put something there, or has taken it away itself
        for folder in folders:
            folder.rmdir()


def _finds(mark: Path) -> bool:
    """Whether the file is there, and with its contents."""
    until = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if mark.exists() and mark.read_text() == mark.name:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(PATIENCE / 20)
