"""Host memory while a checkpoint is saved, against the bytes of the shards that a process has.

python -m benchmarks.save_memory --gib 3 --json benchmarks/results/save_memory.json

The state is shaped like a transformer's: stacks of layers, a table, small vectors. The bar: the peak above what the
process held before is at most 1.3 × the local shards' bytes + 1 GiB. The peak is the kernel's own high-water mark
(VmHWM), which is set back before the save. On CPU the arrays themselves lie in host memory too; they are not counted,
being there before. Ends with 1 where the peak is higher.
"""

import dataclasses
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vla_jax.checkpoint import Checkpoints
from vla_jax.cli.command import cli, run
from vla_jax.types import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryArgs:
    """How much."""

    gib: float = 3.0
    """Size of the state: parameters, moments and EMA of equal parts."""
    devices: tuple[int, ...] = (8, 1)
    """Over how many simulated ones the arrays are divided: one measurement each."""
    saves: int = 4
    """How often to save; the peak is that of all of them."""
    json: Path | None = None
    """Where to write the report."""


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, now, or VmHWM, the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}; this needs Linux")


def shapes(gib: float, devices: int) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Of one of four float32 parts that make `gib` together: shapes and the axes that are divided."""
    width = int((gib * 2**30 / 4 / 4 / 304) ** 0.5) // devices * devices  # 304 width² elements, nearly
    return {
        "gate_up": ((18, 2, width, 4 * width), (None, None, "fsdp")),
        "down": ((18, 4 * width, width), (None, None, "fsdp")),
        "attention": ((18, 4, width, width), (None, None, "fsdp")),
        "table": ((16 * width, width), ("fsdp",)),
        "scale": ((18, width), ()),
        "bias": ((width,), ()),
    }


def make_state(gib: float, devices: int) -> dict[str, PyTree]:
    """The items of a checkpoint: parameters, their average, both moments."""
    mesh = jax.make_mesh(
        (devices,), ("fsdp",), devices=jax.devices()[:devices], axis_types=(jax.sharding.AxisType.Auto,)
    )

    def part(number: int) -> PyTree:
        keys = iter(jax.random.split(jax.random.key(number), 6))
        return {
            name: jax.device_put(jax.random.normal(next(keys), shape), NamedSharding(mesh, P(*axes)))
            for name, (shape, axes) in shapes(gib, devices).items()
        }

    return {"params": part(0), "ema": part(1), "opt_state": {"mu": part(2), "nu": part(3)}}


@functools.partial(jax.jit, donate_argnums=0)
def train(state: PyTree) -> PyTree:
    """Training that goes on while a save runs, and gives the old arrays away."""
    return jax.tree.map(lambda x: x * 0.5, state)


def measure(gib: float, devices: int, saves: int, folder: str) -> dict[str, Any]:
    """Saves a state several times; the peak and what it is compared with."""
    items = jax.block_until_ready(make_state(gib, devices))
    size = sum(x.nbytes for x in jax.tree.leaves(items))
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(0, {"params": {"w": jnp.ones(1000)}}, {"config": {}})  # loads what a first save loads
    checkpoints.wait()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    blocking, whole = [], []
    for step in range(1, saves + 1):
        start = time.perf_counter()
        checkpoints.save(step, items, {"config": {}})
        blocking.append(time.perf_counter() - start)
        items = jax.block_until_ready(train(items))
        checkpoints.wait()
        whole.append(time.perf_counter() - start)
    peak = memory("VmHWM") - before
    checkpoints.close()
    limit = 1.3 * size + 2**30
    return {
        "devices": devices,
        "state_gib": size / 2**30,
        "peak_above_before_gib": peak / 2**30,
        "peak_over_state": peak / size,
        "limit_gib": limit / 2**30,
        "within": peak <= limit,
        "blocking_seconds": blocking,
        "whole_seconds": whole,
    }


def main() -> None:
    """Measures, prints, compares."""
    args = cli(MemoryArgs, description=__doc__)
    if max(args.devices) > 1:  # simulated; one is whichever device there is
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(args.devices))
    reports = []
    for devices in args.devices:
        with tempfile.TemporaryDirectory() as folder:
            reports.append(measure(args.gib, devices, args.saves, folder))
        print(json.dumps(reports[-1], indent=2), flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(reports, indent=2) + "\n")
    over = [r for r in reports if not r["within"]]
    for r in over:
        peak, limit = r["peak_above_before_gib"], r["limit_gib"]
        print(
            f"error: {r['devices']} devices: the peak is {peak:.2f} GiB, the bar {limit:.2f}", file=sys.stderr
        )
    if over:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
