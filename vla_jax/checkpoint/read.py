"""Reading checkpoints: find the newest whole one, restore any item of it onto any devices.

RUN_DIR/checkpoints/<step>/{params, ema, opt_state, frozen}   arrays, each restorable alone
RUN_DIR/checkpoints/<step>/meta                       JSON: everything else that a policy needs
"""

import dataclasses
import errno
import functools
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

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
    """A checkpoint that is there but torn, incomplete or changed: it will never be readable."""


class UnreachableCheckpointError(OSError):
    """A checkpoint that may well be whole, but that this process could not read now: nothing passes over it."""


class _Passing(NamedTuple):
    """Failures to read that say nothing about what was written."""

    kinds: tuple[type[BaseException], ...]
    statuses: tuple[str, ...]
    """What texts of TensorStore, XLA and object stores say instead of an exception of their own."""
    numbers: tuple[int, ...]
    """The operating system's, of an OSError or in TensorStore's text."""
    mend: str


_PASSING = (
    _Passing(
        (MemoryError,),
        ("RESOURCE_EXHAUSTED",),
        (errno.ENOMEM, errno.EMFILE, errno.ENFILE),
        "free memory on the host or the devices, or use more devices",
    ),
    _Passing(
        (PermissionError,),
        ("PERMISSION_DENIED", "UNAUTHENTICATED"),
        (errno.EACCES, errno.EPERM),
        "give this user the right to read it",
    ),
    _Passing(
        (TimeoutError, ConnectionError),
        ("UNAVAILABLE", "DEADLINE_EXCEEDED"),
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
        "see to the disk or the network",
    ),
)


def load(path: str | os.PathLike, item: str, abstract: Any = None) -> Any:
    """One item (``params``, ``ema``, ``opt_state``) of a checkpoint, without reading the others.

    **Arguments:**

    - `path`: a run's directory or its ``checkpoints`` folder (the newest whole one), or one step of it.
    - `abstract`: a tree of `jax.ShapeDtypeStruct` with the shardings to restore into, which need not be those
      it was saved from; None: whole arrays on the first device, as nested dicts.

    Raises FileNotFoundError where there is no checkpoint, ValueError where it is damaged or lacks the item, and
    UnreachableCheckpointError.
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

    Raises FileNotFoundError where there is no checkpoint, ValueError where it is damaged or lacks the item, and
    UnreachableCheckpointError.
    """

    def read(step_dir: Path) -> Loaded:
        meta = read_step_meta(step_dir)
        has = meta["items"]
        trained = item or ("ema" if "ema" in has else "params")
        if trained not in has:
            raise ValueError(f"{step_dir} has no '{trained}'; it has {', '.join(has)}")
        names = [trained] + (["frozen"] if "frozen" in has else [])
        targets = {
            name: _attempt(step_dir, lambda name=name: _placed(step_dir / name, shardings or {}, device))
            for name in names
        }
        parts = restore_items(step_dir, targets, meta, together=bool(shardings))
        return Loaded(join(parts[trained], parts.get("frozen")), trained)

    return _newest(path, read)


def params_shapes(path: str | os.PathLike) -> Loaded:
    """What `load_params` would read, as `jax.ShapeDtypeStruct`s, without reading any array. Raises as it does."""

    def read(step_dir: Path) -> Loaded:
        has = read_step_meta(step_dir)["items"]
        trained = "ema" if "ema" in has else "params"
        names = [trained] + (["frozen"] if "frozen" in has else [])
        parts = [_attempt(step_dir, functools.partial(_saved_shapes, step_dir / name)) for name in names]
        return Loaded(functools.reduce(join, parts), trained)

    return _newest(path, read)


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON of a checkpoint: step, config, items, assets, versions. `path` as for `load`."""
    return _newest(path, read_step_meta)


def whole_steps(folder: Path) -> list[int]:
    """Steps in a folder of checkpoints that were written to the end, oldest first."""
    steps = (int(child.name) for child in folder.iterdir() if child.name.isdigit())
    return sorted(step for step in steps if ocp.utils.is_checkpoint_finalized(folder / str(step)))


def read_step_meta(step_dir: Path) -> dict[str, Any]:
    """The metadata of one step; raises CorruptCheckpointError or UnreachableCheckpointError."""

    def read() -> dict[str, Any]:
        _look_into(step_dir / "meta")
        meta = ocp.JsonCheckpointHandler().restore(step_dir / "meta")
        missing = {"step", "config", "items", "fingerprints"} - meta.keys()
        if missing:
            raise ValueError(f"its metadata lacks {', '.join(sorted(missing))}")
        return meta

    return _attempt(step_dir, read)


def restore_items(
    step_dir: Path, abstract: Mapping[str, Any], meta: Mapping[str, Any], *, together: bool = False
) -> dict[str, Any]:
    """Some items of one step, checked against their checksums; raises as `read_step_meta` does.

    With `together` all processes call it, each reads its own shards, and all raise where one cannot read.
    """

    def read(name: str) -> Any:
        _look_into(step_dir / name)
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
        tree = agreed(step_dir, functools.partial(read, name), together)
        items[name] = _attempt(step_dir, functools.partial(check, name, tree))
    return items


def agreed(step_dir: Path, read: Callable[[], T], together: bool) -> T:
    """`read()`, whose failure to read is raised by all processes where it happens to one.

    Where it is damage to one and out of reach to another, it is out of reach to all: nothing is passed over.
    """
    result, error = None, None
    try:
        result = _attempt(step_dir, read)
    except (CorruptCheckpointError, UnreachableCheckpointError) as failure:
        error = failure
    if together:
        out_of_reach = isinstance(error, UnreachableCheckpointError)
        everyone = distributed.gather("out of reach", str(error) if out_of_reach else "")
        whole = distributed.all_agree("read", error is None)
        first = next((i for i, said in enumerate(everyone) if said), None)
        if first is not None and not out_of_reach:
            error = UnreachableCheckpointError(f"process {first}: {everyone[first]}")
        elif not whole and error is None:
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
    if "[os_error_code=" in line:
        # What the operating system said: behind long paths, before notes in any order.
        return re.split(r" \[(?:os_error_code|tensorstore_spec|source)", line)[0].rsplit(": ", 1)[-1].strip()
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
    _look_into(item_dir)
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


def _attempt(step_dir: Path, read: Callable[[], T]) -> T:
    """Orbax raises many types of exception for a damaged file; they all become CorruptCheckpointError.

    But what only stands between us and the file, by `_PASSING`, becomes UnreachableCheckpointError.

    The coroutines of the arrays that it had not yet reached would print traces of their own when they are
    collected. They are collected here, in silence: the one error says it all.
    """
    try:
        return read()
    except (CorruptCheckpointError, UnreachableCheckpointError):
        raise
    except Exception as error:
        failure = _out_of_reach(step_dir, error) or CorruptCheckpointError(first_line(error))
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.collect()
    sys.unraisablehook = hook
    raise failure


def _out_of_reach(step_dir: Path, error: BaseException) -> UnreachableCheckpointError | None:
    """The error to raise where a failure, or one behind it, says nothing about what was written."""
    for one in _chain(error):
        text = str(one)
        numbers = {int(number) for number in re.findall(r"os_error_code='?(\d+)", text)}
        numbers |= {one.errno} if isinstance(one, OSError) else set()
        for passing in _PASSING:
            named = any(re.search(rf"\b{status}\b", text) for status in passing.statuses)
            if isinstance(one, passing.kinds) or named or numbers & set(passing.numbers):
                return UnreachableCheckpointError(
                    f"checkpoint {step_dir} cannot be read now ({first_line(one)}); it stays where it is: "
                    f"{passing.mend}, then run the same command again"
                )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _look_into(folder: Path) -> None:
    """Raises PermissionError where this process may not: Orbax takes such a folder's files for missing."""
    list(folder.iterdir())
