"""The SigLIP image encoder (Zhai et al. 2023, arXiv:2303.15343), a pre-LN ViT without class token or pooling.

Parameter names and shapes are those of the public PaliGemma checkpoints. Width `d`, `n` heads of size `e`.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from vla_jax.layers import cudnn, init
from vla_jax.layers.attention import Backend, attend
from vla_jax.layers.axes import constrain
from vla_jax.layers.linear import Patches, dense, from_heads, to_heads
from vla_jax.layers.mlp import MLP
from vla_jax.layers.norm import layer_norm
from vla_jax.models.compute import Compute, check_heads
from vla_jax.models.encoders.base import ImageEncoderConfig
from vla_jax.models.stack import CONTEXT, INPUT, PROJECTED, declare_blocks, named, run_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(ImageEncoderConfig):
    """The SigLIP image encoder."""

    kind: Literal["siglip"] = "siglip"
    """Which image encoder; the others have options of their own."""
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
        """Tokens that one camera's image becomes: one per patch."""
        return (self.image_size // self.patch) ** 2

    def check(self, compute: Compute) -> None:
        """cuDNN's flash attention has limits on the width of heads."""
        check_heads(compute, "model.backbone.vision.width / vision.heads", self.width // self.heads)

    def make(self, out_width: int, compute: Compute) -> "SigLIP":
        """The module: uint8 images [b h w 3] → tokens [b p out_width]."""
        return SigLIP(
            self, out_width, jnp.dtype(compute.dtype), compute.remat, compute.unroll, compute.attention
        )


class SigLIP(nn.Module):
    """Images to tokens of the decoder's width."""

    config: VisionConfig
    out_width: int
    dtype: jnp.dtype
    remat: str = "none"
    unroll: int = 1
    attention: Backend = "xla"
    """cudnn: flash attention; splash wants heads of 128 and long sequences, so there it is xla's here."""

    @nn.compact
    def __call__(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b p d"]:
        """Encodes uint8 images [b h w 3] to tokens [b p out_width]; the pixels go to [-1, 1]."""
        cfg = self.config
        if images.shape[1:3] != (cfg.image_size, cfg.image_size):
            raise ValueError(
                f"images are {images.shape[1:3]}, the encoder takes {cfg.image_size}×{cfg.image_size}"
            )
        # Pixels and positions are added in float32; only their sum is rounded to the blocks' type.
        x = images.astype(jnp.float32) / 127.5 - 1.0
        x = Patches(
            cfg.width,
            cfg.patch,
            kernel_init=init.dct_2d((None, None, "patch", "embed")),
            bias_init=init.zeros(("embed",)),
            name="embedding",
        )(x)
        x = x.reshape(x.shape[0], cfg.tokens, cfg.width)
        x = x + self.param(
            "pos_embedding",
            init.sincos_2d((None, "patch", "embed"), cfg.image_size // cfg.patch),
            (1, cfg.tokens, cfg.width),
        )
        x = constrain(x.astype(self.dtype), ("batch", "prefix", "act_embed"))
        x = Transformer(cfg, self.dtype, self.remat, self.unroll, self.attention, name="Transformer")(x)
        return dense(self.out_width, (None, "embed"), self.dtype, name="head")(x)


class Transformer(nn.Module):
    """The stacked blocks and the last norm."""

    config: VisionConfig
    dtype: jnp.dtype
    remat: str
    unroll: int
    attention: Backend

    def setup(self):
        """Declares the stack of blocks and the last norm, under big_vision's names."""
        self.encoderblock = declare_blocks(
            self, "encoderblock", EncoderBlock, (self.config, self.dtype, self.attention),
            depth=self.config.depth, remat=self.remat, unroll=self.unroll,
        )  # fmt: skip
        self.encoder_norm = layer_norm(self.dtype)

    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        """[b p d] to [b p d]."""
        x, _ = run_blocks(self.encoderblock, x)
        return self.encoder_norm(x)


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); attention is bidirectional."""

    config: VisionConfig
    dtype: jnp.dtype
    attention: Backend

    def setup(self):
        """Declares norms, attention and feed-forward layer, named as in the public checkpoints."""
        cfg = self.config
        self.LayerNorm_0, self.LayerNorm_1 = layer_norm(self.dtype), layer_norm(self.dtype)
        self.MultiHeadDotProductAttention_0 = _Attention(cfg, self.attention)
        self.MlpBlock_0 = MLP(cfg.width, cfg.mlp, self.dtype)

    def __call__(
        self, x: Float[Array, "b p d"], own: None = None, shared: None = None
    ) -> tuple[Float[Array, "b p d"], None]:
        """One block; the second output is what is collected over layers: nothing."""
        x = named(x, INPUT)
        x = x + self.MultiHeadDotProductAttention_0(self.LayerNorm_0(x))
        x = x + self.MlpBlock_0(self.LayerNorm_1(x), "prefix")
        return constrain(x, ("batch", "prefix", "act_embed")), None


class _Attention(nn.Module):
    config: VisionConfig
    backend: Backend

    def setup(self):
        width, heads = self.config.width, self.config.heads
        self.query, self.key, self.value = (to_heads(width, heads) for _ in range(3))
        self.out = from_heads(width, heads)

    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        q, k, v = (named(into(x), PROJECTED) for into in (self.query, self.key, self.value))
        q = constrain(q, ("batch", "prefix", "act_heads", None))
        out = cudnn.attend_all(q, k, v) if self.backend == "cudnn" else attend(q, k, v, None)
        return self.out(named(out, CONTEXT))
