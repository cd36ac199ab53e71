"""The device mesh: four named axes, ``data × fsdp × sequence × tensor``.

The batch is split over data and fsdp together; parameters over fsdp, sequence and tensor (see `rules.py`). On several
slices, pods that only the data-centre network (DCN) joins, the data axis goes over them: once per step it sums
gradients, while the other axes talk in every layer.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vla_jax.sharding.config import MeshConfig
from vla_jax.types import Device

#: Mesh axes over which the batch is split.
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """The mesh of all devices (or of those given), with the one axis that is -1 filled in.

    The axes are `AxisType.Auto`: linen's parameter boxes and logical constraints work with no other type.
    Raises ValueError where the axes do not multiply to the number of devices, do not fit the network's torus, or
    would cross slices with anything but data.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes()
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
    types = (AxisType.Auto,) * len(sizes)
    slices = len({slice_of(device) for device in devices})
    try:
        if slices > 1:
            return Mesh(_across_slices(sizes, slices, devices), tuple(sizes), axis_types=types)
        # As jax.make_mesh, but on every TPU an axis may take a part of a torus side where no whole sides multiply to
        # it (make_mesh allows that on v5e only): such an axis has lines instead of rings, but it works.
        placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
        return Mesh(placed, tuple(sizes), axis_types=types)
    except NotImplementedError as error:  # how mesh_utils says that the axes do not tile the torus
        torus = "×".join(str(1 + max(c)) for c in zip(*(device.coords for device in devices)))
        wanted = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"{wanted} cannot be laid out on a torus of {torus} chips; every axis must be a product of sides, or of "
            "parts of them"
        ) from error


def slice_of(device: Device) -> int:
    """Which slice a device belongs to; 0 where the platform has none."""
    return getattr(device, "slice_index", None) or 0


def _across_slices(sizes: dict[str, int], slices: int, devices: Sequence[Device]) -> np.ndarray:
    """Devices in the shape of the mesh, whole slices one after the other along the data axis."""
    if sizes["data"] % slices:
        rest = math.prod(sizes.values()) // sizes["data"]
        raise ValueError(
            f"mesh.data={sizes['data']} is not divisible by the {slices} slices, and no other axis may cross the "
            f"data-centre network; use mesh.data={slices} and {rest * sizes['data'] // slices} devices for the rest"
        )
    inside = (sizes["data"] // slices, *list(sizes.values())[1:])
    over = (slices, *(1 for _ in inside[1:]))
    return mesh_utils.create_hybrid_device_mesh(inside, over, devices, allow_split_physical_axes=True)


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
    return tuple(sorted({row for place in places.values() if place for row in range(batch_size)[place[0]]}))


def check_prefix(tokens: int, patches: int, mesh: Mesh) -> None:
    """Raises ValueError where mesh.sequence does not divide the prefix, or the patches of one camera."""
    shards = mesh.shape["sequence"]
    for name, size in {"the prefix": tokens, "one camera's patches": patches}.items():
        if size % shards:
            common = math.gcd(math.gcd(tokens, patches), shards)
            raise ValueError(
                f"mesh.sequence={shards} does not divide {name}, {size} tokens; use mesh.sequence={common}, or another "
                "data.max_text_tokens"
            )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
