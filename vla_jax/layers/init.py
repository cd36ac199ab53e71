"""Initialisers that carry the logical names of a parameter's axes."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array


def fan_in(
    names: Sequence[str | None], *, in_axis: int | Sequence[int], batch_axis: int | Sequence[int] = ()
) -> Initializer:
    """Truncated normal of variance 1/fan-in, for weights whose input axes are `in_axis`."""
    out_axis = tuple(
        i for i in range(len(names)) if i not in _as_tuple(in_axis) and i not in _as_tuple(batch_axis)
    )
    init = nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis, batch_axis=batch_axis
    )
    return nn.with_logical_partitioning(init, tuple(names))


def kernel(names: Sequence[str | None]) -> Initializer:
    """The same for flax's Dense and Conv, whose input axes are all but the last."""
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
    return nn.with_logical_partitioning(init, tuple(names))


def normal(names: Sequence[str | None], stddev: float) -> Initializer:
    """Normal of the given standard deviation."""
    return nn.with_logical_partitioning(nn.initializers.normal(stddev), tuple(names))


def sincos_2d(names: Sequence[str | None], side: int) -> Initializer:
    """Sines and cosines of row and column for a [1, side², width] position table, before it is learned.

    From-scratch encoders then know from the first step on where a patch lies (Dosovitskiy et al. 2021,
    arXiv:2010.11929, appendix D.4, and the fixed form of Beyer et al. 2022, arXiv:2205.01580). The width must be
    divisible by 4; each value is of size 1, like the features it is added to.
    """

    def table(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        del key
        quarter = shape[-1] // 4
        if shape[-1] % 4:
            raise ValueError(
                f"vision.width={shape[-1]} is not divisible by 4, as sine-cosine positions need it"
            )
        frequency = 100.0 ** -(jnp.arange(quarter) / max(quarter - 1, 1))
        angle = jnp.arange(side)[:, None] * frequency  # side quarter
        waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        rows = jnp.broadcast_to(waves[:, None], (side, side, 2 * quarter))
        columns = jnp.broadcast_to(waves[None], (side, side, 2 * quarter))
        return jnp.concatenate([rows, columns], axis=-1).reshape(shape).astype(dtype)

    return nn.with_logical_partitioning(table, tuple(names))


def dct_2d(names: Sequence[str | None]) -> Initializer:
    """Patch embedding [p, p, channels, width] whose columns are the lowest spatial frequencies of each channel.

    Neighbouring pixels are alike, so a random projection spends nearly all of its outputs on what natural pictures
    do not contain; the cosines of lowest frequency (the discrete cosine transform, Ahmed et al. 1974) carry mean
    colour and where in the patch it lies. Scaled so that pictures come out about as large as from `kernel`; outputs
    beyond the number of pixel values are random.
    """

    def basis(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        side, _, channels, width = shape
        u = jnp.arange(side)
        waves = jnp.cos(jnp.pi * (u + 0.5)[:, None] * u / side) * jnp.where(u == 0, 1, 2**0.5)  # pixel u
        order = sorted((i * i + j * j, i, j) for i in range(side) for j in range(side))
        count = min(width, side * side * channels)
        pairs = order[: -(-count // channels)]
        rows, columns = jnp.array([p[1] for p in pairs]), jnp.array([p[2] for p in pairs])
        planes = waves[:, None, rows] * waves[None, :, columns]  # p p f
        filters = jnp.einsum("xyf,cd->xycfd", planes, jnp.eye(channels)).reshape(side, side, channels, -1)
        filters = filters[..., :count] / side * (width / (side * side * channels)) ** 0.5
        rest = nn.initializers.normal((side * side * channels) ** -0.5)(key, (*shape[:-1], width - count))
        return jnp.concatenate([filters, rest], axis=-1).astype(dtype)

    return nn.with_logical_partitioning(basis, tuple(names))


def zeros(names: Sequence[str | None]) -> Initializer:
    """All zeros, with a logical name for each axis."""
    return nn.with_logical_partitioning(nn.initializers.zeros_init(), tuple(names))


def ones(names: Sequence[str | None]) -> Initializer:
    """All ones, with a logical name for each axis."""
    return nn.with_logical_partitioning(nn.initializers.ones_init(), tuple(names))


def _as_tuple(axis: int | Sequence[int]) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else tuple(axis)
