"""A U-Net for small images: field(x, t) of a 32 x 32 picture, with an optional class.

Ho et al. 2006.11239, appendix B, in its usual small form: residual blocks that are told the time, halved and doubled
resolutions with skips between, self-attention at the lowest. With width 64 and multiples (1, 2, 2) on 32 x 32 x 3:

    in       32 32   3 -> 32 32  64
    down 0   32 32  64 -> 32 32  64, halved to 16 16  64
    down 1   16 16  64 -> 16 16 128, halved to  8  8 128
    down 2    8  8 128 ->  8  8 128
    middle    8  8 128, with attention
    up 2      8  8 (128 + skip) ->  8  8 128, doubled to 16 16 128
    up 1     16 16 (128 + skip) -> 16 16 128, doubled to 32 32 128
    up 0     32 32 (128 + skip) -> 32 32  64
    out      32 32  64 -> 32 32   3
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vla_jax.finite import finite


@dataclasses.dataclass(frozen=True, kw_only=True)
@finite("")
class UNetConfig:
    """Sizes of the U-Net."""

    width: int = 64
    """Channels at full resolution."""
    multiples: tuple[int, ...] = (1, 2, 2)
    """Channels at each resolution, from full to lowest, in widths."""
    blocks: int = 2
    """Residual blocks at each resolution on the way down; one more on the way up."""
    groups: int = 8
    """Groups of the group norms; divides `width`."""
    dropout: float = 0.0
    """Inside residual blocks, in training."""
    classes: int = 0
    """Number of classes; 0: no condition. Class `classes` is "no class"."""

    def __post_init__(self):
        if self.width % self.groups or self.width % 2:
            raise ValueError(f"width {self.width} is not even and divisible by groups {self.groups}")
        if not self.multiples or min(self.multiples) < 1 or self.blocks < 1:
            raise ValueError(f"multiples {self.multiples} and blocks {self.blocks} must be at least 1")

    def check_side(self, side: int) -> None:
        """ValueError if images of this side can't be halved as often as needed."""
        factor = 2 ** (len(self.multiples) - 1)
        if side % factor:
            raise ValueError(
                f"images of side {side} can't be halved {len(self.multiples) - 1} times; use a multiple of {factor}"
            )


def sinusoid(t: Float[Array, " b"], width: int) -> Float[Array, "b d"]:
    """Sines and cosines of 1000 t at wavelengths 2 pi … 2 pi 10^4 (Vaswani et al. 1706.03762, section 3.5)."""
    rate = 1e-4 ** (jnp.arange(width // 2) / (width // 2))
    phase = 1000 * t[:, None] * rate
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=1)


class ResBlock(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))) scaled and shifted by time)))``; the last conv starts at zero."""

    channels: int
    groups: int
    dropout: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b d"], train: bool
    ) -> Float[Array, "b h w e"]:
        """[b h w c] → [b h w channels], inside scaled and shifted by the time's embedding."""
        h = nn.Conv(self.channels, (3, 3))(nn.silu(nn.GroupNorm(self.groups)(x)))
        scale, shift = jnp.split(nn.Dense(2 * self.channels)(nn.silu(emb))[:, None, None], 2, axis=-1)
        h = nn.GroupNorm(self.groups)(h) * (1 + scale) + shift
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = nn.Conv(self.channels, (3, 3), kernel_init=nn.initializers.zeros)(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels)(x)
        return x + h


class PixelAttention(nn.Module):
    """Every pixel attends to every pixel; starts as the identity."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """One head of all channels."""
        b, h, w, c = x.shape
        q, k, v = jnp.split(nn.Dense(3 * c)(nn.GroupNorm(self.groups)(x).reshape(b, h * w, c)), 3, axis=-1)
        weights = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k) * c**-0.5, axis=-1)
        mixed = jnp.einsum("bqk,bkc->bqc", weights, v)
        return x + nn.Dense(c, kernel_init=nn.initializers.zeros)(mixed).reshape(x.shape)


class UNet(nn.Module):
    """The field of an image process."""

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        label: Int[Array, " b"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b h w c"]:
        """Prediction in the shape of `x`; zero before training. With dropout, `train` needs an rng "dropout"."""
        config = self.config
        config.check_side(x.shape[1])
        emb = nn.Dense(4 * config.width)(sinusoid(t, config.width))
        emb = nn.Dense(4 * config.width)(nn.silu(emb))
        if config.classes:
            if label is None:
                label = jnp.full(x.shape[0], config.classes)
            emb = emb + nn.Embed(config.classes + 1, 4 * config.width)(label)
        elif label is not None:
            raise ValueError("a label was given to a U-Net of classes=0")

        def block(h, level):
            return ResBlock(config.multiples[level] * config.width, config.groups, config.dropout)(
                h, emb, train
            )

        lowest = len(config.multiples) - 1
        h = nn.Conv(config.width, (3, 3))(x)
        skips = [h]
        for level in range(lowest + 1):
            for _ in range(config.blocks):
                h = block(h, level)
                skips.append(h)
            if level < lowest:
                h = nn.Conv(h.shape[-1], (3, 3), strides=2)(h)
                skips.append(h)
        h = block(PixelAttention(config.groups)(block(h, lowest)), lowest)
        for level in reversed(range(lowest + 1)):
            for _ in range(config.blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), level)
            if level:
                b, height, width, c = h.shape
                h = jax.image.resize(h, (b, 2 * height, 2 * width, c), "nearest")
                h = nn.Conv(c, (3, 3))(h)
        h = nn.silu(nn.GroupNorm(config.groups)(h))
        return nn.Conv(x.shape[-1], (3, 3), kernel_init=nn.initializers.zeros)(h)
