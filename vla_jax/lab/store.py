"""The directory of a sweep: what was asked for, the cells, and the groups that are being trained.

    OUT/sweep.json                 what was asked for, by whom it was run
    OUT/cells/NAME/config.json     the cell's whole configuration
    OUT/cells/NAME/metrics.jsonl   as launch.train writes it
    OUT/cells/NAME/result.json     what became of it: the cell is finished
    OUT/groups/ID/                 the state of cells that are trained together, until all of them are finished

Everything is written so that a process that is killed at any moment leaves nothing half-done behind.
"""

import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vla_jax.checkpoint.manager import flatten
from vla_jax.config import config_hash, to_json
from vla_jax.files import DamagedFileError, read_json, set_aside, warn, write_json
from vla_jax.lab.grid import Cell
from vla_jax.lab.plan import Group

RESULT = ("config_hash", "evaluation", "val", "closed_loop", "values", "skipped", "diverged")
"""What a cell's result has at least."""


@dataclasses.dataclass(frozen=True)
class Store:
    """A sweep's directory."""

    root: Path

    def cell(self, name: str) -> Path:
        """The directory of a cell."""
        return self.root / "cells" / name

    def group(self, group: Group) -> Path:
        """The directory of a group that is not finished."""
        return self.root / "groups" / group.id

    def result(self, name: str) -> dict[str, Any] | None:
        """What became of a cell; None: it is not finished."""
        path = self.cell(name) / "result.json"
        try:
            return read_json(path, RESULT) if path.exists() else None
        except DamagedFileError as error:
            warn(f"{error}; the cell counts as not finished")
            return None

    def finish(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Writes a cell's result: it is finished then."""
        write_json(dict(result), self.cell(cell.name) / "result.json")

    def is_finished(self, cell: Cell, evaluation: Mapping[str, Any]) -> bool:
        """Whether a cell has a result. Raises ValueError where it was made in another way."""
        result = self.result(cell.name)
        if result is None:
            return False
        where = self.cell(cell.name)
        if result["config_hash"] != config_hash(cell.config):
            old = flatten(read_json(where / "config.json", mend="use another --out"))
            new = flatten(json.loads(to_json(cell.config)))
            differing = [
                f"{key}={new.get(key, 'absent')!r} (there: {old.get(key, 'absent')!r})"
                for key in sorted(old.keys() | new.keys())
                if old.get(key, ...) != new.get(key, ...)
            ]
            raise ValueError(
                f"{where} was made with another config: {', '.join(differing[:4])}; use another --out"
            )
        if result["evaluation"] != dict(evaluation):
            raise ValueError(
                f"{where} was evaluated with {result['evaluation']}, not {dict(evaluation)}; "
                "use the same options, or another --out"
            )
        return True

    def begin(self, cells: Sequence[Cell]) -> None:
        """Makes the cells' directories, each with its configuration."""
        if jax.process_index():
            return
        for cell in cells:
            write_json(json.loads(to_json(cell.config)), self.cell(cell.name) / "config.json")

    def begin_group(self, group: Group) -> Path:
        """Makes a group's directory, in which its cells' names are kept."""
        folder = self.group(group)
        write_json({"cells": [cell.name for cell in group.cells]}, folder / "group.json")
        return folder

    def end_group(self, group: Group) -> None:
        """Deletes the state of a group whose cells are all finished."""
        shutil.rmtree(self.group(group), ignore_errors=True)

    def begun_groups(self, cells: Sequence[Cell]) -> list[Group]:
        """Groups that an earlier process began with these very cells: they go on as they are."""
        known = {cell.name: cell for cell in cells}
        groups = []
        for path in sorted(self.root.glob("groups/*/group.json")):
            try:
                names = read_json(path, ("cells",))["cells"]
            except DamagedFileError as error:
                warn(f"{error}; its cells are looked for by their configurations")
                continue
            if all(name in known for name in names):
                group = Group(tuple(known[name] for name in names))
                if group.id == path.parent.name:
                    groups.append(group)
        return groups

    def ask(self, entry: Mapping[str, Any]) -> None:
        """Adds what is asked for to sweep.json, unless it is there."""
        path = self.root / "sweep.json"
        try:
            asked = self.asked()
        except DamagedFileError as error:
            warn(f"{error}; it begins anew with this command's cells, the old one is now {set_aside(path)}")
            asked = []
        if not any({**old, "versions": None} == {**entry, "versions": None} for old in asked):
            write_json({"sweeps": [*asked, dict(entry)]}, path)

    def asked(self) -> list[dict[str, Any]]:
        """What was asked for so far. Raises DamagedFileError."""
        path = self.root / "sweep.json"
        mend = "give launch.sweep the same command again: it writes the file anew and trains no finished cell again"
        return read_json(path, ("sweeps",), mend)["sweeps"] if path.exists() else []

    @contextlib.contextmanager
    def lock(self, name: str = "sweep") -> Iterator[None]:
        """Only one process (or group of hosts) at a time; the lock ends with its process, however that ends."""
        if jax.process_index():
            yield
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / f".{name}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{self.root} is being written by another process; wait for it") from error
            yield
