"""The placement report: what lies where, and what is not split at all."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from vla_jax.sharding.rules import path_name


@dataclasses.dataclass(frozen=True)
class PlacedArray:
    """One array of the state."""

    name: str
    shape: tuple[int, ...]
    spec: str
    bytes: int
    """Bytes of the whole array."""
    device_bytes: int
    """Bytes of one device's shard."""
    split: bool
    """Whether any mesh axis of more than one device splits it."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a tree of arrays lies."""

    rows: tuple[PlacedArray, ...]
    mesh: dict[str, int]

    @property
    def bytes(self) -> int:
        """Bytes of all arrays, each counted once."""
        return sum(row.bytes for row in self.rows)

    @property
    def device_bytes(self) -> int:
        """Bytes of all arrays on each device."""
        return sum(row.device_bytes for row in self.rows)

    @property
    def unsharded_share(self) -> float:
        """Share of the bytes in arrays that every device holds whole."""
        return sum(row.bytes for row in self.rows if not row.split) / max(self.bytes, 1)

    def table(self) -> str:
        """One line per array: name, shape, spec, bytes per device."""
        cells = [("array", "shape", "spec", "per device")]
        cells += [
            (r.name, "×".join(map(str, r.shape)) or "scalar", r.spec, human(r.device_bytes))
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = [
            f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:>{widths[3]}}"
            for row in cells
        ]
        return "\n".join(lines)

    def summary(self) -> str:
        """One line per top-level item (params, ema, opt_state) and one for the whole."""
        groups: dict[str, list[PlacedArray]] = {}
        for row in self.rows:
            groups.setdefault(row.name.split("/")[0], []).append(row)
        lines = []
        for name, rows in groups.items():
            part = Placement(tuple(rows), self.mesh)
            elements = sum(math.prod(row.shape) for row in rows)
            sizes = f"{human(part.bytes):>10}  {human(part.device_bytes):>10}/device"
            lines.append(f"  {name:<10} {elements:>14,} values  {sizes}")
        mesh = " × ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        devices = math.prod(self.mesh.values())
        share = f", {self.unsharded_share:.1%} not sharded" if devices > self.mesh["data"] else ""
        lines.append(
            f"mesh {mesh} ({devices} devices): {human(self.device_bytes)} of state per device{share}"
        )
        return "\n".join(lines)


def placement(abstract: Any, shardings: Any, mesh: Mesh) -> Placement:
    """The report for a tree of (abstract) arrays and the tree of their NamedShardings."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    rows = [
        _row(path_name(path), leaf, sharding)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    ]
    return Placement(tuple(rows), dict(mesh.shape))


def check_unsharded(table: Placement, limit: float) -> None:
    """Raises ValueError where a mesh that splits the model leaves more than `limit` of its bytes whole everywhere.

    A mesh of data alone splits nothing, on purpose, and passes.
    """
    splits = {axis: size for axis, size in table.mesh.items() if axis != "data" and size > 1}
    if not splits or table.unsharded_share <= limit:
        return
    whole = sorted((row for row in table.rows if not row.split), key=lambda row: -row.bytes)
    worst = ", ".join(f"{row.name} ({human(row.bytes)})" for row in whole[:3])
    raise ValueError(
        f"{table.unsharded_share:.1%} of the state lies whole on every device although "
        f"{' and '.join(f'mesh.{axis}={size}' for axis, size in splits.items())} should split it: {worst}; name their "
        f"axes in vla_jax/sharding/rules.py, or allow it with mesh.max_unsharded={_round_up(table.unsharded_share)}"
    )


def _round_up(share: float) -> float:
    return math.ceil(share * 100) / 100


def human(size: float) -> str:
    """A number of bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _row(name: str, leaf: Any, sharding: NamedSharding) -> PlacedArray:
    shard = sharding.shard_shape(leaf.shape)
    itemsize = leaf.dtype.itemsize
    return PlacedArray(
        name=name,
        shape=tuple(leaf.shape),
        spec=", ".join(str(entry) for entry in sharding.spec) or "-",
        bytes=math.prod(leaf.shape) * itemsize,
        device_bytes=math.prod(shard) * itemsize,
        split=shard != tuple(leaf.shape),
    )
