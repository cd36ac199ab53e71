"""How many devices each mesh axis gets."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The device mesh ``data × fsdp × tensor``. One device is just 1×1×1."""

    data: int = -1
    """Copies of the model, each with its own part of the batch; -1: all devices that the other axes leave."""
    fsdp: int = 1
    """Shards of parameters, optimiser state and EMA; the batch is split over data × fsdp. -1: the rest."""
    tensor: int = 1
    """Shards of heads and feed-forward width inside each layer; keep it within one host. -1: the rest."""

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name}={size}: give a positive number of devices, or -1 for the rest")
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(f"mesh: only one axis can be -1, but {' and '.join(rest)} are; set one of them")
