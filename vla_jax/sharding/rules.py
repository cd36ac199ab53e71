"""The one table that says where every named axis of every array lies on the mesh.

Models name the axes of their parameters (``nn.with_logical_partitioning``) and activations
(`layers.axes.constrain`); nothing else in the library mentions a mesh axis. Parameters, their
optimiser moments and their EMA carry the same names, so they are sharded alike.

Two traps, both measured: a name that is not in the table silently replicates its axis, so `shardings` and
`constrain` refuse it; and ``with mesh:`` silently drops every activation constraint, so use `activate`, which sets
the mesh with `jax.set_mesh`.
"""

import contextlib
import difflib
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vla_jax.sharding.mesh import BATCH_AXES

#: (logical axis, mesh axis or axes or None = every device holds the whole axis).
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # parameters
    ("layers", None),  # scanned over: a shard per device would be gathered on every iteration
    ("embed", ("fsdp", "sequence")),  # the residual width, which nearly every parameter has
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", None),  # Gemma has one: there is nothing to split
    ("head_dim", None),
    ("vocab", "tensor"),
    ("patch", None),  # pixels of a patch, positions of a patch
    ("action", None),  # action and state dimensions: a few dozen
    # activations
    ("batch", BATCH_AXES),
    ("replica", "data"),  # the batch where the other mesh axes hold parts of a parameter instead
    (
        "prefix",
        "sequence",
    ),  # tokens of the backbone; keys and values are gathered (Gemma has one head of them)
    ("length", None),  # tokens that stay together: the expert's, and whatever queries look at
    ("act_embed", None),  # the batch already lies on fsdp
    ("act_mlp", "tensor"),
    ("act_heads", "tensor"),
)


def mesh_axes_of(name: str | None) -> frozenset[str]:
    """The mesh axes that an axis of a logical name is split over."""
    axes = dict(RULES).get(name or "")
    return frozenset() if axes is None else frozenset({axes} if isinstance(axes, str) else axes)


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
    """Inside, the models' activation constraints mean this mesh and the table above."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def is_box(x: Any) -> bool:
    """Whether x is a parameter still in the box that carries its axes' names."""
    return isinstance(x, meta.AxisMetadata)


def logical_names(path: str, leaf: Any) -> tuple[str | None, ...]:
    """The logical axis names of a boxed leaf; raises ValueError on unknown names and on unnamed arrays."""
    if not is_box(leaf):
        if leaf.ndim:
            raise ValueError(
                f"parameter {path} {leaf.shape} names no axes, so it would be copied to every device; "
                "create it with nn.with_logical_partitioning"
            )
        return ()
    known = {name for name, _ in RULES}
    for name in leaf.names:
        if name is not None and name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0)[0]
            raise ValueError(
                f"parameter {path}: axis '{name}' is not in vla_jax/sharding/rules.py; did you mean '{near}'?"
            )
    return tuple(leaf.names)


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of boxed (abstract) arrays: the same tree, with the boxes taken off.

    `boxed` comes from ``jax.eval_shape`` of an initialiser. Optimiser states made from boxed parameters carry
    the boxes along, so they work too. Raises ValueError where a name is unknown, an array has no names, or an
    axis does not divide evenly over its mesh axes: nothing is replicated silently.
    """

    def place(path, leaf) -> Any:
        if not jax.tree.leaves(leaf):  # what an optimiser puts where it keeps nothing for a parameter
            return nn.unbox(leaf)
        name = path_name(path)
        axes = logical_names(name, leaf)
        spec = nn.logical_to_mesh_axes(axes, RULES) if axes else None
        spec = PartitionSpec() if spec is None else _drop_idle(spec, mesh)
        _check_divides(name, nn.unbox(leaf).shape, axes, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=is_box)


def _drop_idle(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """The spec without axes of one device beside others, so that ("fsdp", "sequence") mostly reads fsdp."""

    def simplify(entry):
        if not isinstance(entry, tuple):
            return entry
        busy = tuple(axis for axis in entry if mesh.shape.get(axis, 1) > 1) or entry[:1]
        return busy[0] if len(busy) == 1 else busy

    return PartitionSpec(*map(simplify, spec))


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as ``backbone/llm/…``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_divides(name: str, shape, axes, spec: PartitionSpec, mesh: Mesh) -> None:
    for size, axis, entry in zip(shape, axes, spec):
        mesh_axes: tuple[str, ...] = () if entry is None else (entry,) if isinstance(entry, str) else entry
        shards = math.prod(mesh.shape[a] for a in mesh_axes)
        if mesh_axes and size % shards:
            sizes = " × ".join(f"mesh.{a}={mesh.shape[a]}" for a in mesh_axes)
            # Shrink the last of them to what the others leave divisible; where nothing does, the first.
            others = math.prod(mesh.shape[a] for a in mesh_axes[:-1])
            fits = size % others == 0
            mesh_axis = mesh_axes[-1] if fits else mesh_axes[0]
            use = math.gcd(size // others, mesh.shape[mesh_axis]) if fits else math.gcd(size, shards)
            raise ValueError(
                f"parameter {name} {tuple(shape)}: axis '{axis}' of {size} is not divisible by {sizes}; "
                f"use mesh.{mesh_axis}={use}"
            )
