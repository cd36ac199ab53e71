"""Reading checkpoints: restore any item of the newest whole one onto any devices.

RUN_DIR/checkpoints/<step>/{params, ema, opt_state, frozen}   arrays, each restorable alone
RUN_DIR/checkpoints/<step>/meta                       JSON: everything else that a policy needs
RUN_DIR/checkpoints/<step>/checksums.json             what these files must hold (`manifest`)
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from vla_jax.checkpoint.failures import CorruptCheckpointError, agreed, attempt, first_line
from vla_jax.checkpoint.fingerprint import fingerprint
from vla_jax.checkpoint.manifest import NAME, Manifest, read_manifest
from vla_jax.checkpoint.paths import Path
from vla_jax.checkpoint.plain_sum import plain_sum
from vla_jax.checkpoint.steps import newest
from vla_jax.checkpoint.tree import flatten, join, nest
from vla_jax.types import Device

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Saved:
    """One step that was found: whatever is read of it is of this step."""

    folder: Path
    meta: dict[str, Any]
    manifest: Manifest | None
    """None for checkpoints without one, whose metadata nothing vouches for."""

    @property
    def step(self) -> int:
        """The training step, as the metadata say; the folder may be called otherwise."""
        return self.meta["step"]

    def has(self, item: str) -> None:
        """Raises ValueError where the step lacks an item."""
        if item not in self.meta["items"]:
            raise ValueError(f"{self.folder} has no '{item}'; it has {', '.join(self.meta['items'])}")

    def check(self, part: str) -> None:
        """Raises CorruptCheckpointError where a part's files, but those of the arrays, are not what was written."""
        manifest = self.manifest
        if manifest is not None:
            attempt(self.folder, lambda: manifest.check(self.folder, part))

    def item(self, item: str, abstract: Any = None) -> Any:
        """One item, see `load`."""
        self.has(item)
        return restore_items(self.folder, {item: abstract}, self.meta)[item]

    def built(self, what: str, build: Callable[[], T]) -> T:
        """`build()`, which makes something of the metadata.

        Where it fails, the metadata are damaged (CorruptCheckpointError: an older step is used); but where their
        checksum is right they are of another version (ValueError).
        """
        try:
            return build()
        except Exception as error:
            known = isinstance(error, ValueError) and not isinstance(
                error, UnicodeError | json.JSONDecodeError
            )
            said = first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
            if self.manifest is None:
                raise CorruptCheckpointError(f"its {what}: {said}") from error
            raise ValueError(f"{self.folder}: its {what} cannot be read by this version ({said})") from error

    def params(
        self,
        item: str | None = None,
        *,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        device: Device | None = None,
    ) -> "Loaded":
        """All parameters, see `load_params`."""
        has = self.meta["items"]
        trained = item or ("ema" if "ema" in has else "params")
        self.has(trained)
        names = [trained] + (["frozen"] if "frozen" in has else [])

        def placed(name: str) -> Any:
            return _placed(self.folder / name, shardings or {}, device)

        targets = {name: attempt(self.folder, functools.partial(placed, name)) for name in names}
        parts = restore_items(self.folder, targets, self.meta, together=bool(shardings))
        return Loaded(join(parts[trained], parts.get("frozen")), trained)

    def params_shapes(self) -> "Loaded":
        """What `params` would read, as `jax.ShapeDtypeStruct`s, without reading any array. Raises as it does."""
        has = self.meta["items"]
        trained = "ema" if "ema" in has else "params"
        names = [trained] + (["frozen"] if "frozen" in has else [])
        for name in names:
            self.check(name)
        parts = [attempt(self.folder, functools.partial(_saved_shapes, self.folder / name)) for name in names]
        return Loaded(functools.reduce(join, parts), trained)


def open_newest(path: str | os.PathLike, read: Callable[[Saved], T]) -> T:
    """`read` of the newest step that is whole, all of it from that one step.

    `path` is a run's directory or its ``checkpoints`` folder, or one step's folder. Where `read` raises
    CorruptCheckpointError, the next older step is used, with a warning. Raises FileNotFoundError where there is no
    checkpoint, ValueError where it is damaged, and UnreachableCheckpointError.
    """
    return newest(path, lambda folder: read(open_step(folder)))


def load(path: str | os.PathLike, item: str, abstract: Any = None) -> Any:
    """One item (``params``, ``ema``, ``opt_state``) of a checkpoint, without reading the others.

    **Arguments:**

    - `path`: a run's directory or its ``checkpoints`` folder (the newest whole one), or one step of it.
    - `abstract`: a tree of `jax.ShapeDtypeStruct` with the shardings to restore into, which need not be those
      it was saved from; None: whole arrays on the first device, as nested dicts.

    Raises FileNotFoundError where there is no checkpoint, ValueError where it is damaged or lacks the item, and
    UnreachableCheckpointError.
    """

    return open_newest(path, lambda saved: saved.item(item, abstract))


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
    device: Device | None = None,
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

    return open_newest(path, lambda saved: saved.params(item, shardings=shardings, device=device))


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON of a checkpoint: step, config, items, assets, versions. `path` as for `load`.

    Whoever wants arrays too takes both from `open_newest`, lest they be of two steps.
    """
    return open_newest(path, lambda saved: saved.meta)


def open_step(step_dir: Path) -> Saved:
    """One step with its metadata; raises CorruptCheckpointError or UnreachableCheckpointError."""

    def read() -> Saved:
        manifest = read_manifest(step_dir)
        _look_into(step_dir / "meta")
        data = (step_dir / "meta" / "metadata").read_bytes()
        if manifest is not None:
            manifest.check_bytes("meta/metadata", data)
        meta = json.loads(data)
        missing = {"step", "config", "items", "fingerprints"} - meta.keys()
        if missing:
            raise ValueError(f"its metadata lacks {', '.join(sorted(missing))}")
        if manifest is None and any(isinstance(sums, Mapping) for sums in meta["fingerprints"].values()):
            raise ValueError(f"it lacks {NAME}")
        if type(meta["step"]) is not int:
            raise ValueError(f"its metadata say step {meta['step']!r}")
        return Saved(step_dir, meta, manifest)

    return attempt(step_dir, read)


def restore_items(
    step_dir: Path, abstract: Mapping[str, Any], meta: Mapping[str, Any], *, together: bool = False
) -> dict[str, Any]:
    """Some items of one step, checked against their checksums; raises as `open_step` does.

    With `together` all processes call it, each reads its own shards, and all raise where one cannot read.
    """

    def read(name: str) -> Any:
        _look_into(step_dir / name)
        manifest = read_manifest(step_dir)
        if manifest is not None:
            manifest.check(step_dir, name)
        target = _saved_shapes(step_dir / name) if abstract[name] is None else abstract[name]
        with _checkpointer() as checkpointer:
            return checkpointer.restore(step_dir / name, target)

    def check(name: str, tree: Any) -> Any:
        saved = meta["fingerprints"][name]
        if not isinstance(saved, Mapping):
            if plain_sum(tree) != saved:
                raise ValueError(f"the checksum of '{name}' is wrong")
            return tree
        found = fingerprint(tree)
        wrong = [path for path in sorted(saved.keys() | found.keys()) if saved.get(path) != found.get(path)]
        if wrong:
            more = f" and {len(wrong) - 1} more of its arrays" if len(wrong) > 1 else ""
            raise ValueError(f"the checksum of '{name}' is wrong: {wrong[0]}{more}")
        return tree

    items = {}
    for name in abstract:
        # The checksum is computed by all processes, so all of them must have got that far.
        tree = agreed(step_dir, functools.partial(read, name), together)
        items[name] = attempt(step_dir, functools.partial(check, name, tree))
    return items


def _checkpointer() -> ocp.StandardCheckpointer:
    """One that reads this process's shards and waits for nobody, so that a failure is not a deadlock."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def _saved_shapes(item_dir: Path, device: Device | None = None) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
    _look_into(item_dir)
    saved = ocp.StandardCheckpointHandler().metadata(item_dir).tree
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved)


def _placed(
    item_dir: Path, shardings: Mapping[str, jax.sharding.Sharding], device: Device | None = None
) -> Any:
    """The saved shapes with the shardings that are wanted."""
    saved = _saved_shapes(item_dir, device)
    if not shardings:
        return saved
    first = next(iter(shardings.values()))
    if not isinstance(first, jax.sharding.NamedSharding):
        raise TypeError(f"shardings of a mesh are expected, not {first}")
    everywhere = jax.sharding.NamedSharding(first.mesh, jax.sharding.PartitionSpec())

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


def _look_into(folder: Path) -> None:
    """Raises PermissionError where this process may not: Orbax takes such a folder's files for missing."""
    list(folder.iterdir())
