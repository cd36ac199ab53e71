"""Initialisers that carry the logical names of a parameter's axes."""

from collections.abc import Sequence

import flax.linen as nn
from flax.typing import Initializer


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


def zeros(names: Sequence[str | None]) -> Initializer:
    """Zeros."""
    return nn.with_logical_partitioning(nn.initializers.zeros_init(), tuple(names))


def ones(names: Sequence[str | None]) -> Initializer:
    """Ones."""
    return nn.with_logical_partitioning(nn.initializers.ones_init(), tuple(names))


def _as_tuple(axis: int | Sequence[int]) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else tuple(axis)
