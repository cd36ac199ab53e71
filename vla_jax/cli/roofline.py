"""The least time that a call can take on a device: its arithmetic at peak, or its bytes at full bandwidth.

Of each part of the model, for the very shape that is run, the model says (models/work.py) its FLOPs and what it reads:
the weights once per pass and the context once per evaluation; activations are taken to stay on the chip. What need not
be computed (what the time adds, the unused half of the last prefix layer) is not counted. A part takes no less than the
longer of the two; the parts follow one another.
"""

import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax.models.config import VLAConfig
from vla_jax.models.work import served
from vla_jax.train.flops import PEAK_FLOPS
from vla_jax.types import Device

#: Memory bandwidth of one device in bytes/s, by `jax.Device.device_kind` (vendors' data sheets).
BANDWIDTH = {
    "TPU v3": 4.5e11,  # per core, which is a device there
    "TPU v4": 1.228e12,
    "TPU v5 lite": 8.19e11,
    "TPU v5e": 8.19e11,
    "TPU v5": 2.765e12,
    "TPU v5p": 2.765e12,
    "TPU v6 lite": 1.64e12,
    "TPU v6e": 1.64e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA L4": 3.0e11,
    "NVIDIA L40S": 8.64e11,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA B200": 8.0e12,
}


LEAST_READ, MOST_READ = 2**20, 2**28
"""Bytes of the matrix that a CPU's bandwidth is measured with."""


class Bound(NamedTuple):
    """Of one part of a call."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Peak:
    """What a device could do."""

    flops: float
    """Per second."""
    bandwidth: float
    """Bytes per second."""
    source: str

    def seconds(self, part: Bound) -> float:
        """The least time."""
        return max(part.flops / self.flops, part.bytes / self.bandwidth)


def bounds(
    model: VLAConfig,
    *,
    batch: int,
    cameras: int,
    length: int,
    samples: int,
    evaluations: int,
    itemsize: int,
    cache_itemsize: int | None = None,
) -> dict[str, Bound]:
    """Vision, prefill and denoise of one call.

    `length`: text tokens; `itemsize`: bytes of a weight; `cache_itemsize`: of a key or value, where it is another one
    (int8 is for weights only).
    """
    seen = dataclasses.replace(model, cameras=tuple(f"camera_{i}" for i in range(cameras)))
    times = {"denoise": evaluations}
    return {
        name: Bound(
            times.get(name, 1) * part.flops,
            times.get(name, 1) * (itemsize * part.weights + (cache_itemsize or itemsize) * part.context),
        )
        for name, part in served(seen, text_tokens=length, rows=batch, samples=samples).items()
    }


def peak(
    device: Device, devices: int = 1, dtype: str = "bfloat16", *, weight_bytes: int = MOST_READ
) -> Peak | None:
    """Of so many devices together for products of a dtype; None where the kind is not known. CPUs are measured, now.

    A CPU reads weights that fit its caches several times as fast as larger ones: its bandwidth is measured on
    `weight_bytes`.

    XLA multiplies float32 on a TPU by rounding to bfloat16, and on an NVIDIA GPU as TF32, at half the rate of bfloat16
    (both unless a higher `jax_default_matmul_precision` is asked for).
    """
    if device.platform == "cpu":
        size = min(max(weight_bytes, LEAST_READ), MOST_READ)
        source = f"measured: float32 matrix product of 2048, matrix-vector products of {size / 2**20:.0f} MiB"
        return Peak(_matmul(), _read(size), source)
    kind = device.device_kind
    if kind not in PEAK_FLOPS or kind not in BANDWIDTH:
        return None
    slower, unit = (2, "tf32") if dtype == "float32" and kind.startswith("NVIDIA") else (1, "bf16")
    return Peak(
        PEAK_FLOPS[kind] * devices / slower,
        BANDWIDTH[kind] * devices,
        f"data sheet of {devices} × {kind}, {unit}",
    )


def _matmul(size: int = 2048) -> float:
    x = jnp.ones((size, size), jnp.float32)
    return 2 * size**3 / _fastest(jax.jit(jnp.matmul), x, x)


def _read(size: int) -> float:
    """Bytes read per second by products of a matrix of this size with a vector, one after the other."""
    side = int((size / 4) ** 0.5)
    repeats = max(1, MOST_READ // size)

    @jax.jit
    def products(matrix, vector):
        return jax.lax.fori_loop(0, repeats, lambda _, v: (matrix @ v) / side, vector)

    matrix, vector = jnp.ones((side, side), jnp.float32), jnp.ones(side, jnp.float32)
    return 4 * side**2 * repeats / _fastest(products, matrix, vector)


def _fastest(function, *arguments: jax.Array, repeats: int = 7) -> float:
    function(*arguments).block_until_ready()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*arguments).block_until_ready()
        taken.append(time.perf_counter() - start)
    return float(np.min(taken))
