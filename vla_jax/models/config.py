"""The configuration of a model: one backbone, one expert, and how both are computed.

A preset of `models/presets.py` is one value of `VLAConfig`.
"""

import dataclasses
from typing import Literal

from vla_jax.layers.attention import Backend
from vla_jax.models.backbones.base import BackboneConfig
from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.compute import Compute, Remat
from vla_jax.models.experts.base import ExpertConfig
from vla_jax.models.experts.joint import JointConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLAConfig:
    """A backbone and its action expert. Which ones there are stands in `BACKBONES` and `EXPERTS`."""

    backbone: BackboneConfig = PaliGemmaConfig()
    expert: ExpertConfig = JointConfig()
    cameras: tuple[str, ...] = ()
    """Cameras in the order of their tokens; empty: data.cameras, or all that the data set has, by name. Weights bring
    their own along."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of matrix products; parameters, norms, softmax, logits and losses are float32."""
    remat: Remat = "none"
    """What the backward pass keeps of each block, on the device or (offload) on the host: models/stack.py's table."""
    attention: Backend = "xla"
    """How attention is computed: xla anywhere, cudnn on NVIDIA GPUs (heads above 128 wide need Hopper), splash on TPUs.
    The kernels pay off where the prefix is long."""
    unroll: int = 1
    """Blocks per iteration of the scan over layers; the full depth is faster for tiny models on CPU."""

    def __post_init__(self):
        if len(set(self.cameras)) != len(self.cameras):
            raise ValueError(f"model.cameras={self.cameras} names a camera twice")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError(
                f"model.attention=cudnn takes bfloat16, but model.dtype={self.dtype}; use model.dtype=bfloat16"
            )
        if self.unroll < 1:
            raise ValueError(f"model.unroll={self.unroll}: at least 1")
        if self.cameras and not self.backbone.reads_images:
            raise ValueError(
                f"model.cameras={self.cameras}, but model.backbone.kind={self.backbone.kind} is told to look at none; "
                "leave model.cameras empty"
            )
        for name, part in {"backbone": self.backbone, "expert": self.expert}.items():
            if part.kind != type(part).kind:
                raise ValueError(
                    f"model.{name}.kind={part.kind} in a {type(part).__name__}, whose options are others; "
                    "models.kinds.of_kind makes one of the other kind"
                )
            part.check(self.compute)
        missing = sorted(self.expert.reads - self.backbone.offers)
        if missing:
            raise ValueError(
                f"model.expert.kind={self.expert.kind} reads {missing[0]} of its backbone, but model.backbone.kind="
                f"{self.backbone.kind} leaves {', '.join(sorted(self.backbone.offers)) or 'nothing'}; choose another"
            )
        if not (self.expert.is_network or self.backbone.has_text):
            raise ValueError(
                f"model.expert.kind={self.expert.kind} lets a language model write the actions, but "
                f"model.backbone.kind={self.backbone.kind} has none; choose another"
            )

    @property
    def compute(self) -> Compute:
        """Options that change how the network is computed, and not which network it is."""
        return Compute(dtype=self.dtype, remat=self.remat, attention=self.attention, unroll=self.unroll)

    @property
    def reads_state(self) -> bool:
        """Whether the network is given the robot's state; where not, only the prompt can tell it."""
        return self.expert.reads_state or self.backbone.reads_state

    @property
    def leaves(self) -> frozenset[str]:
        """Fields of `Context` that the backbone fills in: what the expert reads, and what decoded text does."""
        return self.expert.reads | (frozenset({"kv"}) if self.backbone.has_text else frozenset())

    @property
    def image_tokens(self) -> int:
        """Tokens of all cameras, before the text."""
        return len(self.cameras) * self.backbone.image_tokens

    @property
    def sized_by(self) -> tuple[tuple[str, str], ...]:
        """(pattern of parameter paths, field): arrays that may be missing from another model's parameters, or have
        another shape there, where that field is another."""
        parts = {"backbone": self.backbone, "expert": self.expert}
        return tuple(
            (f"{n}/{path}", f"{n}.{field}") for n, part in parts.items() for path, field in part.sized_by
        )

    def unknown(self) -> dict[str, int | tuple[str, ...]]:
        """What may be left to the data set, by option; 0 or empty: still unknown."""
        cameras = {"cameras": self.cameras} if self.backbone.reads_images else {}
        return {**self.backbone.unknown(), **self.expert.unknown(), **cameras}
