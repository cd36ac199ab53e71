"""Sizes of the models. A preset of `models/presets.py` is one value of `VLAConfig`."""

import dataclasses
from typing import Literal

Remat = Literal[
    "none",
    "nothing_saveable",
    "save_context",
    "save_attention",
    "dots_with_no_batch_dims_saveable",
    "offload_inputs",
    "offload_dots",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The SigLIP image encoder."""

    image_size: int = 64
    """Height and width of every camera's image in pixels."""
    patch: int = 8
    """Side of a square patch in pixels; a camera gives (image_size / patch)² tokens."""
    width: int = 128
    """Width of the residual stream."""
    depth: int = 3
    """Transformer blocks."""
    mlp: int = 256
    """Width of the feed-forward layer."""
    heads: int = 4
    """Attention heads."""

    def __post_init__(self):
        if self.image_size % self.patch:
            raise ValueError(
                f"vision.image_size={self.image_size} is not a multiple of vision.patch={self.patch}; "
                f"use image_size={self.image_size // self.patch * self.patch or self.patch}"
            )
        if self.width % self.heads:
            raise ValueError(f"vision.width={self.width} is not divisible by vision.heads={self.heads}")

    @property
    def tokens(self) -> int:
        """Tokens per camera."""
        return (self.image_size // self.patch) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The Gemma decoder that reads image tokens and text."""

    vocab: int = 0
    """Rows of the embedding; 0: as many as the data set's tokenizer has."""
    width: int = 128
    """Width of the residual stream."""
    depth: int = 3
    """Transformer blocks; the expert has as many."""
    mlp: int = 256
    """Width of the gated feed-forward layer."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 1
    """Key/value heads."""
    head_dim: int = 32
    """Width of a head."""

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"text.heads={self.heads} is not divisible by text.kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"text.head_dim={self.head_dim} is odd; rotary positions need an even one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """What turns the backbone's cache into a chunk of actions."""

    kind: Literal["joint", "tokens"] = "joint"
    """joint: weights of its own beside the decoder's, in one attention (π0, arXiv:2410.24164). tokens: no expert at
    all; the decoder itself writes the chunk as FAST tokens, one after the other (π0-FAST, arXiv:2501.09747), and of
    the fields below only horizon, action_dim and state_dim are used."""
    width: int = 96
    """Width of the residual stream."""
    mlp: int = 192
    """Width of the gated feed-forward layer."""
    time: Literal["mlp", "adarms"] = "mlp"
    """How the flow time enters: mixed into the action tokens by an MLP (π0) or through adaptive RMSNorm (π0.5)."""
    clock: Literal["forward", "reversed"] = "forward"
    """Which time the network is told: t, or 1 - t as the public π0's are, so that their weights fit unchanged.
    Everywhere else t = 0 is noise."""
    state_token: bool = True
    """Whether the robot's state is a token before the actions (π0). Without it only the prompt can hold the state
    (data.prompt)."""
    horizon: int = 8
    """Actions of one chunk."""
    action_dim: int = 0
    """Action dimension; 0: as the data set has."""
    state_dim: int = 0
    """State dimension; 0: as the data set has."""
    padding: Literal["zero", "noise"] = "zero"
    """What the network reads in action dimensions that the model has and the robot has not: zeros, or the noisy chunk
    as in the others, as the public π0's do (there the data are zeros). A network can only be sampled as it was trained,
    so that weights that come in, and all that is trained from them, are `noise`."""

    def __post_init__(self):
        if self.kind not in ("joint", "tokens"):
            raise ValueError(f"expert.kind={self.kind!r}: use joint or tokens")
        if self.padding not in ("zero", "noise"):
            raise ValueError(f"expert.padding={self.padding!r}: use zero or noise")
        if self.horizon < 1:
            raise ValueError(f"expert.horizon={self.horizon}: a chunk needs at least one action")
        if self.width % 2:
            raise ValueError(f"expert.width={self.width} is odd; the time embedding needs an even one")

    @property
    def reads_state(self) -> bool:
        """Whether the network is given the robot's state; where not, only the prompt can tell it."""
        return self.kind == "joint" and self.state_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLAConfig:
    """A PaliGemma-style backbone and its action expert."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    expert: ExpertConfig = ExpertConfig()
    cameras: tuple[str, ...] = ()
    """Cameras in the order of their tokens; empty: data.cameras, or all that the data set has, by name. Weights bring
    their own along."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of matrix products; parameters, norms, softmax, logits and losses are float32."""
    remat: Remat = "none"
    """What the backward pass keeps of each block, on the device or (offload) on the host: models/stack.py's table."""
    attention: Literal["xla", "cudnn", "splash"] = "xla"
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
        for name, width in {
            "text.head_dim": self.text.head_dim,
            "vision.width / vision.heads": self.vision.width // self.vision.heads,
        }.items():
            if self.attention == "cudnn" and (width % 8 or width > 256):
                raise ValueError(
                    f"model.attention=cudnn takes heads whose width is a multiple of 8 up to 256, but model.{name} "
                    f"is {width}; use model.attention=xla"
                )
        if self.unroll < 1:
            raise ValueError(f"model.unroll={self.unroll}: at least 1")
