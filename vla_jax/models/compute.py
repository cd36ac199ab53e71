"""How a network is computed: nothing here changes what it computes, up to rounding."""

import dataclasses
from typing import Literal

from vla_jax.layers.attention import Backend

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
class Compute:
    """What a backbone and an expert are told beside their sizes; the fields are `VLAConfig`'s, which documents them."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    attention: Backend = "xla"
    unroll: int = 1


def check_heads(compute: Compute, what: str, width: int) -> None:
    """Raises ValueError where attention's kernel does not take heads of a width, which is the option `what`."""
    if compute.attention == "cudnn" and (width % 8 or width > 256):
        raise ValueError(
            f"model.attention=cudnn takes heads whose width is a multiple of 8 up to 256, but {what} is {width}; "
            "use model.attention=xla"
        )
