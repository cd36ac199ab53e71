"""The SigLIP image encoder (Zhai et al. 2023, arXiv:2303.15343), a pre-LN ViT without class token or pooling.

Parameter names and shapes are those of the public PaliGemma checkpoints. Width `d`, `n` heads of size `e`.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from vla_jax.layers import cudnn, init
from vla_jax.layers.attention import Backend, attend
from vla_jax.layers.axes import constrain
from vla_jax.layers.linear import Dense, Patches, declare, multiply
from vla_jax.models.stack import CONTEXT, INPUT, PROJECTED, declare_blocks, named, run_blocks


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
        return Dense(
            self.out_width,
            dtype=self.dtype,
            kernel_init=init.kernel((None, "embed")),
            bias_init=init.zeros(("embed",)),
            name="head",
        )(x)


class Transformer(nn.Module):
    """The stacked blocks and the last norm."""

    config: VisionConfig
    dtype: jnp.dtype
    remat: str
    unroll: int
    attention: Backend

    def setup(self):
        """Declares them."""
        self.encoderblock = declare_blocks(
            self, "encoderblock", EncoderBlock, (self.config, self.dtype, self.attention),
            depth=self.config.depth, remat=self.remat, unroll=self.unroll,
        )  # fmt: skip
        self.encoder_norm = _layer_norm(self.dtype)

    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        """[b p d] to [b p d]."""
        x, _ = run_blocks(self.encoderblock, x)
        return self.encoder_norm(x)


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); attention is bidirectional."""

    config: VisionConfig
    dtype: jnp.dtype
    attention: Backend

    @nn.compact
    def __call__(
        self, x: Float[Array, "b p d"], own: None = None, shared: None = None
    ) -> tuple[Float[Array, "b p d"], None]:
        """One block; the second output is what is collected over layers: nothing."""
        x = named(x, INPUT)
        attention = _Attention(self.config, self.attention, name="MultiHeadDotProductAttention_0")
        x = x + attention(_layer_norm(self.dtype, "LayerNorm_0")(x))
        x = x + _Mlp(self.config, self.dtype, name="MlpBlock_0")(_layer_norm(self.dtype, "LayerNorm_1")(x))
        return constrain(x, ("batch", "prefix", "act_embed")), None


class _Attention(nn.Module):
    config: VisionConfig
    backend: Backend

    @nn.compact
    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        heads, width = self.config.heads, self.config.width // self.config.heads
        into = dict(
            names=("embed", "heads", "head_dim"), shape=(self.config.width, heads, width), contracted=1
        )
        names = ("query", "key", "value")
        q, k, v = (named(_Projection(**into, name=name)(x), PROJECTED) for name in names)
        q = constrain(q, ("batch", "prefix", "act_heads", None))
        out = cudnn.attend_all(q, k, v) if self.backend == "cudnn" else attend(q, k, v, None)
        out = named(out, CONTEXT)
        back = dict(
            names=("heads", "head_dim", "embed"), shape=(heads, width, self.config.width), contracted=2
        )
        return _Projection(**back, name="out")(out)


class _Projection(nn.Module):
    """x · kernel + bias over the last `contracted` axes of x, which are the first ones of the kernel.

    flax's DenseGeneral does the same, but initialises a flattened kernel, which has no place for three axis names.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    contracted: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        contracted = tuple(range(self.contracted))
        kernel = declare(self, "kernel", init.fan_in(self.names, in_axis=contracted), self.shape)
        bias = self.param("bias", init.zeros(self.names[self.contracted :]), self.shape[self.contracted :])
        into, outof = "def"[: self.contracted], "def"[self.contracted :]
        return multiply(f"bt{into},def->bt{outof}", x, kernel) + bias.astype(x.dtype)


class _Mlp(nn.Module):
    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        x = Dense(
            self.config.mlp,
            dtype=self.dtype,
            kernel_init=init.kernel(("embed", "mlp")),
            bias_init=init.zeros(("mlp",)),
            name="Dense_0",
        )(x)
        x = constrain(nn.gelu(x), ("batch", "prefix", "act_mlp"))
        return Dense(
            self.config.width,
            dtype=self.dtype,
            kernel_init=init.kernel(("mlp", "embed")),
            bias_init=init.zeros(("embed",)),
            name="Dense_1",
        )(x)


def _layer_norm(dtype: jnp.dtype, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with the public checkpoints' epsilon; flax computes its statistics in float32."""
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=dtype,
        scale_init=init.ones(("embed",)),
        bias_init=init.zeros(("embed",)),
        name=name,
    )
