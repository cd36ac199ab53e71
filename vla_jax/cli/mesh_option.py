"""``--mesh data=4,tensor=2``: how the commands that run policies name the devices that share a call."""

from jax.sharding import Mesh

from vla_jax.cli.command import UsageError
from vla_jax.sharding import MeshConfig, make_mesh


def mesh_of(text: str) -> Mesh | None:
    """The mesh; None for an empty text: one device. Raises UsageError, ValueError."""
    if not text:
        return None
    sizes = {name: size for name, _, size in (part.partition("=") for part in text.split(","))}
    unknown = sorted(set(sizes) - {"data", "fsdp", "tensor"})
    if unknown or not all(size.isdigit() for size in sizes.values()):
        raise UsageError(f"--mesh {text!r}: give data, fsdp or tensor with a number, e.g. data=4,tensor=2")
    return make_mesh(MeshConfig(**({"data": 1} | {name: int(size) for name, size in sizes.items()})))
