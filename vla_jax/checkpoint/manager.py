"""The checkpoints of a run that is being trained: save while training goes on, continue from the newest.

A step counts as a checkpoint only once it is whole: while it is written it has another name (on object stores:
no commit mark). What is nevertheless unreadable (a truncated file, a flipped bit) is found on restoring, and the
newest whole one is used, with a warning. What cannot be read for another reason (no right to, no memory, no answer
from the storage) is an error, and stays where it is.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from vla_jax.checkpoint import noise, write
from vla_jax.checkpoint.failures import (
    CorruptCheckpointError,
    UnreachableCheckpointError,
    agreed,
    first_line,
)
from vla_jax.checkpoint.fingerprint import fingerprint
from vla_jax.checkpoint.manifest import write_manifest
from vla_jax.checkpoint.paths import Path, is_remote, run_path
from vla_jax.checkpoint.read import open_step, restore_items
from vla_jax.checkpoint.steps import FOLDER, whole_steps
from vla_jax.sharding import distributed
from vla_jax.sharding.report import human

#: The folder, beside the checkpoints, where unreadable ones are moved.
UNREADABLE = "checkpoints.unreadable"


@dataclasses.dataclass(frozen=True)
class Restored:
    """What came back: the step, the arrays by item name, the metadata."""

    step: int
    items: dict[str, Any]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them. Only one process (or one group) may hold a run.

    Every method is called by all processes of the group; each writes and reads its own shards.
    """

    def __init__(self, run_dir: str | os.PathLike, *, keep: int):
        self.directory = run_path(run_dir) / FOLDER
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            # Where a folder cannot be made in the background, Orbax's threads wait for it for 20 minutes.
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=self._seal, create_directories_asynchronously=False
            ),
        )
        try:
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, handler_registry=write.registry()
            )
        except OSError as error:
            raise OSError(
                f"checkpoints cannot be kept in {self.directory} ({first_line(error)}); mend that, or use another "
                "run directory"
            ) from error
        self._saving: int | None = None
        self._failure = False
        """Whether a save has failed: this object is of no use any more."""

    def save(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts to save; returns as soon as the arrays are copied to the host and may change again.

        `items` are trees of arrays, `meta` JSON values, among them `config`. Waits for the previous save
        first. Raises OSError where that one or this one cannot be written.
        """
        self.wait()
        try:
            self._check_space(step, items)
        except FileNotFoundError as error:
            raise self._failed(step, error) from error
        self._saving = step
        record = dict(
            meta,
            step=step,
            items=sorted(items),
            fingerprints={name: fingerprint(tree) for name, tree in items.items()},
            versions=versions(),
        )
        args = {name: write.arrays(tree) for name, tree in items.items()}
        noise.drop_late_reports()
        try:
            self._manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(record)))
        except Exception as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Blocks until the save in progress is a whole checkpoint; raises OSError where it cannot be."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(self._saving, error) from error
        self._saving = None
        write.give_back()

    def restore_latest(
        self,
        abstract: Mapping[str, Any],
        *,
        same: Mapping[str, Any],
        identity: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
        free: tuple[str, ...] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> Restored | None:
        """The newest whole checkpoint, or None where there is none at all.

        Raises UnreachableCheckpointError, and moves nothing, where one might be whole but cannot be read now.

        **Arguments:**

        - `abstract`: for each item a tree of `jax.ShapeDtypeStruct` with the shardings to restore into, which
          need not be those it was saved from.
        - `same`: entries of the metadata that must be what they were, above all `config`. Raises ValueError where
          the checkpoint's differ in any field but those whose dotted names start with one of `free`.
        - `identity`: what of the checkpoint's metadata is compared with `same`; None: its entries of the same names.
        - `defaults`: the config's default values, which fields have that the checkpoint is older than.
        """
        warnings: list[str] = []
        self._name_by_step()
        steps = self._shared_steps()
        for step in reversed(steps):
            step_dir = self.directory / str(step)
            try:
                saved = agreed(step_dir, lambda: open_step(step_dir), together=True)
                meta = saved.meta
                compared = (
                    {key: meta.get(key) for key in same}
                    if identity is None
                    else saved.built("configuration or data", lambda: identity(meta))
                )
                _check_same(step_dir, compared, same, free, flatten(defaults or {}))
                items = restore_items(step_dir, abstract, meta, together=True)
            except CorruptCheckpointError as error:
                warnings.append(f"checkpoint {step_dir} is unreadable ({error})")
                continue
            for warning in warnings if not jax.process_index() else ():
                print(f"warning: {warning}; continuing from step {step}", file=sys.stderr)
            self._move_aside([newer for newer in steps if newer > step])
            return Restored(saved.step, items, meta)
        if warnings:
            raise ValueError(f"{warnings[0]} and no older one is whole; move the folder away to start afresh")
        return None

    def close(self) -> None:
        """Waits for a save in progress and lets go of the directory."""
        self.wait()
        # After a failed save, of which wait has told, Orbax would tell of it again.
        with contextlib.suppress(Exception) if self._failure else contextlib.nullcontext():
            self._manager.close()
        if self._failure:
            noise.collect()

    def _seal(self) -> None:
        """Called by Orbax in process 0, on a thread, when all files of a step are written and it has no name yet."""
        step = str(self._saving)
        drafts = [
            path
            for path in self.directory.iterdir()
            if path.name == step or path.name.startswith(f"{step}.orbax-checkpoint-tmp")
        ]
        (draft,) = drafts  # on an object store it has its name from the beginning
        write_manifest(draft, int(step))

    def _name_by_step(self) -> None:
        """A step is what the metadata say: a folder that was given another name gets that of its step again."""
        if not jax.process_index():
            for name in whole_steps(self.directory):
                folder = self.directory / str(name)
                try:
                    step = open_step(folder).step
                except (CorruptCheckpointError, UnreachableCheckpointError):
                    continue  # said when it is its turn
                if step == name:
                    continue
                target = self.directory / str(step)
                if target.exists():
                    target = self._unreadable(f"{step}-as-{name}")
                folder.rename(target)
                print(f"warning: {folder} holds step {step}; it is now {target}", file=sys.stderr)
        distributed.barrier("checkpoints are named by their steps")
        self._manager.reload()

    def _unreadable(self, name: str) -> Path:
        """A free name in the folder of what is moved aside."""
        folder = self.directory.with_name(UNREADABLE)
        folder.mkdir(exist_ok=True)
        earlier = sum(1 for old in folder.iterdir() if old.name.startswith(f"{name}-"))
        return folder / f"{name}-{earlier}"

    def _shared_steps(self) -> list[int]:
        """The whole steps, oldest first; raises ValueError where the processes do not see the same ones."""
        mine = json.dumps(whole_steps(self.directory))
        everyones = distributed.gather("checkpoints", mine)
        for i, seen in enumerate(everyones):
            if seen != everyones[0]:
                raise ValueError(
                    f"process {i} sees the checkpoints {seen} in {self.directory}, process 0 {everyones[0]}; "
                    "--run-dir must be a directory that all processes share"
                )
        return json.loads(mine)

    def _move_aside(self, steps: list[int]) -> None:
        """Unreadable steps would block the saves to come; they are kept for whoever wants to look at them."""
        if not steps:
            return
        if not jax.process_index():
            for step in steps:
                (self.directory / str(step)).rename(self._unreadable(str(step)))
        distributed.barrier("unreadable checkpoints are moved")
        self._manager.reload()

    def _check_space(self, step: int, items: Mapping[str, Any]) -> None:
        """A full disk is better met before than in the middle of writing."""
        if is_remote(self.directory):
            return
        shards = [s for x in jax.tree.leaves(dict(items)) for s in x.addressable_shards if s.replica_id == 0]
        needed, free = sum(s.data.nbytes for s in shards), shutil.disk_usage(self.directory).free
        if needed > free:
            raise self._failed(step, OSError(f"{human(needed)} to write, {human(free)} free on the disk"))

    def _failed(self, step: int, error: Exception) -> OSError:
        """The error to raise where a save failed: one line that says what is still there."""
        self._saving, self._failure = None, True
        noise.drop_coroutines()
        noise.collect()
        whole = []
        with contextlib.suppress(OSError):  # the folder itself may be gone, or be a file
            whole = [s for s in whole_steps(self.directory) if s != step]
        kept = f"the newest whole one is {whole[-1]}" if whole else "there is no earlier one"
        return OSError(
            f"checkpoint {step} could not be written to {self.directory} ({first_line(error)}); {kept}"
        )


LIBRARIES = (
    # the program and its compilers
    "vla_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy",
    "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt",
    # the data: order, files, pictures, texts
    "grain", "tensorflow-datasets", "array-record", "pillow", "tokenizers", "sentencepiece", "transformers",
)  # fmt: skip
"""What decides the numbers of a run, as package registries call it."""


def versions() -> dict[str, str]:
    """The versions of everything that decides what a checkpoint means, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # vla_jax, run from its sources
            found[package] = importlib.metadata.version(package)
    return found


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON objects as ``{"a.b.c": value}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _check_same(
    where: os.PathLike, saved: Mapping, given: Mapping, free: tuple[str, ...], defaults: Mapping
) -> None:
    old, new = (
        {key.removeprefix("config."): value for key, value in flatten(x).items()} for x in (saved, given)
    )
    old = {key: value for key, value in defaults.items() if key in new} | old
    differing = [
        f"{key}={new.get(key, 'absent')!r} (saved: {old.get(key, 'absent')!r})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, ...) != new.get(key, ...) and not key.startswith(free)
    ]
    if differing:
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise ValueError(
            f"{where} belongs to another config: {', '.join(differing[:6])}{more}; "
            "use that config again, or another run directory"
        )
