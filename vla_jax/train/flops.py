"""FLOPs of a model, counted analytically, and what the devices could do: the two halves of MFU.

XLA's own count sees the body of a scan once, so it is useless for stacked layers. Our convention:

- a multiply-add is 2 FLOPs; only matrix products and attention are counted;
- attention is counted whole (every query with every key), as it is computed: a prefix-LM is not causal;
- training is 3 forward passes: the forward one, the activations' gradient, the weights' gradient. Of frozen matrices
  there is no weights' gradient, and before the first trained parameter none of activations (`Trained`). A matrix
  with LoRA's factors is frozen; their own two products are counted beside it (`train.run.train_flops`);
- what rematerialisation computes again is not counted;
- padding is counted: it is computed.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vla_jax.models.backbones.paligemma import PaliGemmaConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.encoders.siglip import VisionConfig
from vla_jax.models.experts.joint import JointConfig
from vla_jax.models.gemma import TextConfig
from vla_jax.models.kinds import required
from vla_jax.types import Device

#: Peak dense bf16 FLOP/s of one device, by `jax.Device.device_kind` (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v3": 6.15e13,  # per core, which is a device there
    "TPU v4": 2.75e14,
    "TPU v5 lite": 1.97e14,
    "TPU v5e": 1.97e14,
    "TPU v5": 4.59e14,
    "TPU v5p": 4.59e14,
    "TPU v6 lite": 9.18e14,
    "TPU v6e": 9.18e14,
    "NVIDIA A100-SXM4-40GB": 3.12e14,
    "NVIDIA A100-SXM4-80GB": 3.12e14,
    "NVIDIA L4": 1.21e14,
    "NVIDIA L40S": 3.62e14,
    "NVIDIA H100 80GB HBM3": 9.89e14,
    "NVIDIA H100 PCIe": 7.56e14,
    "NVIDIA H200": 9.89e14,
    "NVIDIA B200": 2.25e15,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """Share of each part's matrix elements that have a gradient; None where the part has no trained parameter at all.

    Attention's own products, which have no weights, are counted as if they were matrices of their part.
    """

    vision: float | None = 1.0
    decoder: float | None = 1.0
    """Without the token table."""
    table: float | None = 1.0
    """The token table: logits, and embeddings before the decoder."""
    expert: float | None = 1.0
    through: bool = True
    """Whether the expert's loss reaches the backbone."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one sample, by part."""

    vision: int
    """All cameras through the encoder."""
    decoder: int
    """The prefix through the language model."""
    logits: int
    """The output layer at the text targets."""
    expert: int
    """One pass of the expert over one chunk; 0 where there is none."""
    chunk_tokens: int = 0
    """The chunk as FAST tokens through the language model, with their logits."""

    def train_sample(self, noise_draws: int, trained: Trained = Trained()) -> float:
        """Forward and backward of one training sample with so many draws of noise."""
        images = trained.vision is not None
        backbone = images or trained.decoder is not None or trained.table is not None
        suffix = trained.expert is not None or (backbone and trained.through)

        def passes(reached: bool, share: float | None) -> float:
            return 1 + reached + (share or 0.0)

        return (
            self.vision * passes(images, trained.vision)
            + (self.decoder + self.chunk_tokens) * passes(backbone, trained.decoder)
            + self.logits * passes(backbone, trained.table)
            + noise_draws * self.expert * passes(suffix, trained.expert)
        )

    def chunk(self, evaluations: int) -> int:
        """Sampling one chunk: the prefix once, the expert `evaluations` times; no text is decoded."""
        return self.vision + self.decoder + evaluations * self.expert


def model_flops(
    config: VLAConfig,
    *,
    text_tokens: int,
    target_tokens: int,
    chunk_tokens: int = 0,
    chunk_targets: int = 0,
) -> Flops:
    """Counts a model whose sizes are all known.

    `text_tokens` is the padded length of the text, `target_tokens` at how many positions logits are computed,
    `chunk_tokens` the padded length of a chunk as tokens, of which `chunk_targets` have logits.
    """
    backbone, expert = required(config.backbone, PaliGemmaConfig, "model_flops"), config.expert
    vision, text = backbone.vision, backbone.text
    prefix = len(config.cameras) * vision.tokens + text_tokens
    return Flops(
        vision=len(config.cameras) * _vision(vision, text.width),
        decoder=_tower(text, text.width, text.mlp, prefix, prefix),
        logits=2 * target_tokens * text.width * text.vocab,
        expert=_expert(text, expert, prefix) if isinstance(expert, JointConfig) else 0,
        chunk_tokens=_tower(text, text.width, text.mlp, chunk_tokens, prefix + chunk_tokens)
        + 2 * chunk_targets * text.width * text.vocab,
    )


def _expert(text: TextConfig, expert: JointConfig, prefix: int) -> int:
    """One evaluation over one chunk."""
    suffix = expert.horizon + expert.state_token
    adaptive = expert.time == "adarms"
    projections = expert.horizon * 2 * expert.action_dim * expert.width  # in and out
    projections += expert.state_token * expert.state_dim * expert.width
    times = suffix if expert.state_token else 1  # the state's is another, so that none is shared
    if adaptive:
        projections += 2 * expert.width**2  # time MLP
        projections += times * (2 * text.depth + 1) * 3 * expert.width**2  # the norms' scale, shift and gate
    else:
        projections += (2 * expert.horizon + 1) * expert.width**2  # [action, time] → width → width
    return _tower(text, expert.width, expert.mlp, suffix, prefix + suffix) + 2 * projections


def _vision(config: VisionConfig, out: int) -> int:
    """One camera: patches, blocks, projection to the decoder's width."""
    tokens, width = config.tokens, config.width
    per_token = 4 * width**2 + 2 * width * config.mlp + 2 * tokens * width
    ends = 3 * config.patch**2 * width + width * out
    return 2 * tokens * (config.depth * per_token + ends)


def _tower(heads: TextConfig, width: int, mlp: int, queries: int, keys: int) -> int:
    """Blocks of Gemma's kind with the attention heads of `heads`: projections, attention, gated MLP."""
    attention_width = heads.heads * heads.head_dim
    projections = 2 * width * attention_width + 2 * width * heads.kv_heads * heads.head_dim
    per_token = projections + 2 * keys * attention_width + 3 * width * mlp
    return 2 * queries * heads.depth * per_token


def total_peak(devices: Sequence[Device]) -> float | None:
    """What the devices could do per second together, in bf16; None for a kind that is not in the table.

    CPUs have no useful nominal figure: there it is what a float32 matrix product reaches, measured now, of the
    whole machine (on which simulated devices share the same cores).
    """
    device = devices[0]
    if device.platform == "cpu":
        return _measured_peak()
    peak = PEAK_FLOPS.get(device.device_kind)
    return None if peak is None else peak * len(devices)


def _measured_peak(size: int = 1024, seconds: float = 0.2) -> float:
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
