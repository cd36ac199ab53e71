"""How many devices each mesh axis gets."""

import dataclasses

from vla_jax.finite import finite

AXES = ("data", "fsdp", "sequence", "tensor")
"""The mesh axes, slowest network first: `data` may cross slices, `tensor` wants the nearest neighbours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("mesh.")
class MeshConfig:
    """The device mesh ``data × fsdp × sequence × tensor``. One device is just 1×1×1×1."""

    data: int = -1
    """Copies of the model, each with its own part of the batch; -1: all devices that the other axes leave. On several
    slices (pods joined by the data-centre network) it is the only axis that crosses them."""
    fsdp: int = 1
    """Shards of parameters, optimiser state and EMA; the batch is split over data × fsdp. -1: the rest."""
    sequence: int = 1
    """Shards of the prefix (image patches and text) where a device has less than one sample; the parameters are split
    over it as over fsdp. -1: the rest."""
    tensor: int = 1
    """Shards of heads and feed-forward width inside each layer; keep it within one host. -1: the rest."""
    max_unsharded: float = 0.02
    """Largest share of the state's bytes that every device may hold whole where fsdp, sequence or tensor split it."""

    def __post_init__(self):
        sizes = self.sizes()
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name}={size}: give a positive number of devices, or -1 for the rest")
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(f"mesh: only one axis can be -1, but {' and '.join(rest)} are; set one of them")
        if not 0 <= self.max_unsharded <= 1:
            raise ValueError(f"mesh.max_unsharded={self.max_unsharded}: a share lies in [0, 1]")

    def sizes(self) -> dict[str, int]:
        """Devices per axis, -1 where it takes the rest."""
        return {name: getattr(self, name) for name in AXES}
