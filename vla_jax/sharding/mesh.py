"""The device mesh: three named axes, ``data × fsdp × tensor``.

The batch is split over data and fsdp together; parameters over fsdp and tensor (see `rules.py`).
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vla_jax.sharding.config import MeshConfig

#: Mesh axes over which the batch is split.
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices (or of those given), with the one axis that is -1 filled in.

    The axes are `AxisType.Auto`: linen's parameter boxes and logical constraints work with no other type.
    Raises ValueError where the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    known = math.prod(size for size in sizes.values() if size != -1)
    asked = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    if -1 in sizes.values():
        if len(devices) % known:
            raise ValueError(
                f"{asked}: {known} does not divide the {len(devices)} devices; "
                f"use sizes whose product is one of {_divisors(len(devices))}"
            )
        sizes = {name: len(devices) // known if size == -1 else size for name, size in sizes.items()}
    elif known != len(devices):
        raise ValueError(
            f"{asked} needs {known} devices, but there are {len(devices)}; set one axis to -1 to use them all"
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices
    )


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How the leading axis of every array of a batch lies on the mesh."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises ValueError where a microbatch does not divide over the batch shards."""
    shards = batch_shards(mesh) * accumulate
    if batch_size % shards:
        micro = f" × {accumulate} microbatches" if accumulate > 1 else ""
        axes = f"mesh.data={mesh.shape['data']} × mesh.fsdp={mesh.shape['fsdp']}"
        raise ValueError(
            f"batch {batch_size} is not divisible by {batch_shards(mesh)} batch shards ({axes}){micro}; "
            f"use train.batch_size={-(-batch_size // shards) * shards}"
        )


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """The rows of a global batch that lie on this process's devices, ascending.

    They need not be neighbours (a TPU's mesh follows its wires, not its hosts), and two processes have the same
    rows where an axis other than the batch's runs across them.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return tuple(sorted({row for (rows,) in places.values() for row in range(batch_size)[rows]}))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
