"""Reading checkpoints: find the newest whole one, restore any item of it onto any devices.

RUN_DIR/checkpoints/<step>/{params, ema, opt_state, frozen}   arrays, each restorable alone
RUN_DIR/checkpoints/<step>/meta                       JSON: everything else that a policy needs
"""

import dataclasses
import functools
import gc
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from vla_jax.checkpoint.fingerprint import fingerprint
from vla_jax.checkpoint.paths import Path, run_path
from vla_jax.checkpoint.tree import flatten, join, nest
from vla_jax.sharding import distributed

T = TypeVar("T")

#: The folder of checkpoints inside a run's directory.
FOLDER = "checkpoints"


class CorruptCheckpointError(ValueError):
    """A checkpoint that is there but cannot be read."""


def load(path: str | os.PathLike, item: str, abstract: Any = None) -> Any:
    """One item (``params``, ``ema``, ``opt_state``) of a checkpoint, without reading the others.

    **Arguments:**

    - `path`: a run's directory or its ``checkpoints`` folder (the newest whole one), or one step of it.
    - `abstract`: a tree of `jax.ShapeDtypeStruct` with the shardings to restore into, which need not be those
      it was saved from; None: whole arrays on the first device, as nested dicts.

    Raises FileNotFoundError where there is no checkpoint, ValueError where it is damaged or lacks the item.
    """

    def read(step_dir: Path) -> Any:
        meta = read_step_meta(step_dir)
        if item not in meta["items"]:
            raise ValueError(f"{step_dir} has no '{item}'; it has {', '.join(meta['items'])}")
        return restore_items(step_dir, {item: abstract}, meta)[item]

    return _newest(path, read)


@dataclasses.dataclass
class Loaded:
    """Parameters of a checkpoint, and the item that the trained ones are from (``params`` or ``ema``)."""

    params: dict[str, Any]
    item: str


def load_params(
    path: str | os.PathLike,
    item: str | None = None,
    *,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    device: jax.Device | None = None,
) -> Loaded:
    """All parameters of a checkpoint, those that were frozen with them.

    **Arguments:**

    - `item`: ``params`` or ``ema``; None: the averaged ones where the run has them.
    - `shardings`: where to put which array, by path (``backbone/img/…``), on one mesh. What it does not name or
      divide goes to every device; None: all to one.
    - `device`: which one that is; default: the first.

    Raises FileNotFoundError where there is no checkpoint, ValueError where it is damaged or lacks the item.
    """

    def read(step_dir: Path) -> Loaded:
        meta = read_step_meta(step_dir)
        has = meta["items"]
        trained = item or ("ema" if "ema" in has else "params")
        if trained not in has:
            raise ValueError(f"{step_dir} has no '{trained}'; it has {', '.join(has)}")
        names = [trained] + (["frozen"] if "frozen" in has else [])
        targets = {
            name: _attempt(lambda name=name: _placed(step_dir / name, shardings or {}, device))
            for name in names
        }
        parts = restore_items(step_dir, targets, meta, together=bool(shardings))
        return Loaded(join(parts[trained], parts.get("frozen")), trained)

    return _newest(path, read)


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON of a checkpoint: step, config, items, assets, versions. `path` as for `load`."""
    return _newest(path, read_step_meta)


def whole_steps(folder: Path) -> list[int]:
    """Steps in a folder of checkpoints that were written to the end, oldest first."""
    steps = (int(child.name) for child in folder.iterdir() if child.name.isdigit())
    return sorted(step for step in steps if ocp.utils.is_checkpoint_finalized(folder / str(step)))


def read_step_meta(step_dir: Path) -> dict[str, Any]:
    """The metadata of one step; raises CorruptCheckpointError."""

    def read() -> dict[str, Any]:
        meta = ocp.JsonCheckpointHandler().restore(step_dir / "meta")
        missing = {"step", "config", "items", "fingerprints"} - meta.keys()
        if missing:
            raise ValueError(f"its metadata lacks {', '.join(sorted(missing))}")
        return meta

    return _attempt(read)


def restore_items(
    step_dir: Path, abstract: Mapping[str, Any], meta: Mapping[str, Any], *, together: bool = False
) -> dict[str, Any]:
    """Some items of one step, checked against their checksums; raises CorruptCheckpointError.

    With `together` all processes call it, each reads its own shards, and all raise where one cannot read.
    """

    def read(name: str) -> Any:
        target = _saved_shapes(step_dir / name) if abstract[name] is None else abstract[name]
        with _checkpointer() as checkpointer:
            return checkpointer.restore(step_dir / name, target)

    def check(name: str, tree: Any) -> Any:
        if fingerprint(tree) != meta["fingerprints"][name]:
            raise ValueError(f"the checksum of '{name}' is wrong")
        return tree

    items = {}
    for name in abstract:
        # The checksum is computed by all processes, so all of them must have got that far.
        tree = agreed(functools.partial(read, name), together)
        items[name] = _attempt(functools.partial(check, name, tree))
    return items


def agreed(read: Callable[[], T], together: bool) -> T:
    """`read()`, whose CorruptCheckpointError is raised by all processes where it happens to one."""
    result, error = None, None
    try:
        result = _attempt(read)
    except CorruptCheckpointError as failure:
        error = failure
    if together and not distributed.all_agree("read", error is None) and error is None:
        error = CorruptCheckpointError("another process cannot read it")
    if error is not None:
        raise error
    return result


def _checkpointer() -> ocp.StandardCheckpointer:
    """One that reads this process's shards and waits for nobody, so that a failure is not a deadlock."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def first_line(error: BaseException) -> str:
    """An exception in one line of bearable length."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    line = line.split(" See full TensorStore details")[0]
    system = re.search(r"([^:]*) \[os_error_code=", line)  # what the operating system said, behind long paths
    if system:
        return system.group(1).strip()
    return line if len(line) <= 200 else line[:197] + "..."


def _newest(path: str | os.PathLike, read: Callable[[Path], Any]) -> Any:
    candidates = _locate(run_path(path))
    for i, step_dir in enumerate(candidates):
        try:
            return read(step_dir)
        except CorruptCheckpointError as error:
            message = f"checkpoint {step_dir} is unreadable ({error})"
            if i + 1 == len(candidates):
                raise ValueError(message) from error
            print(f"warning: {message}; using step {candidates[i + 1].name}", file=sys.stderr)


def _locate(path: Path) -> list[Path]:
    """The steps that `path` stands for, newest first."""
    if path.name.isdigit() and (path / "meta").is_dir():
        return [path]
    for folder in (path / FOLDER, path):
        steps = whole_steps(folder) if folder.is_dir() else []
        if steps:
            return [folder / str(step) for step in reversed(steps)]
    raise FileNotFoundError(f"no checkpoint in {path}: give a run's directory, or one of its {FOLDER}/<step>")


def _saved_shapes(item_dir: Path, device: jax.Device | None = None) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
    saved = ocp.StandardCheckpointHandler().metadata(item_dir).tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved)


def _placed(
    item_dir: Path, shardings: Mapping[str, jax.sharding.Sharding], device: jax.Device | None = None
) -> Any:
    """The saved shapes with the shardings that are wanted."""
    saved = _saved_shapes(item_dir, device)
    if not shardings:
        return saved
    everywhere = jax.sharding.NamedSharding(next(iter(shardings.values())).mesh, jax.sharding.PartitionSpec())

    def place(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = shardings.get(name, everywhere)
        sharding = sharding if _divides(sharding, leaf.shape) else everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return nest({name: place(name, leaf) for name, leaf in flatten(saved).items()})


def _divides(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> bool:
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


def _attempt(read: Callable[[], T]) -> T:
    """Orbax raises many types of exception for a damaged file; they all become CorruptCheckpointError.

    The coroutines of the arrays that it had not yet reached would print traces of their own when they are
    collected. They are collected here, in silence: the one error says it all.
    """
    try:
        return read()
    except Exception as error:
        message = first_line(error)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.collect()
    sys.unraisablehook = hook
    raise CorruptCheckpointError(message)
