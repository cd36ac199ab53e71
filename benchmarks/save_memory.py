"""Host memory while a checkpoint is saved, against the bytes of the shards that a process has.

python -m benchmarks.save_memory --gib 3 --json benchmarks/results/save_memory.json

The state is shaped like a transformer's: stacks of layers, a table, small vectors. The bar: the peak above what the
process held before is at most 1.3 × the local shards' bytes + 1 GiB. The peak is the kernel's own high-water mark
(VmHWM), which is set back before the save. On CPU the arrays themselves lie in host memory too; they are not counted,
being there before. Ends with 1 where the peak is higher.
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

from launch._main import cli, run


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryArgs:
    """How much."""

    gib: float = 3.0
    """Size of the state: parameters, moments and EMA of equal parts."""
    devices: int = 8
    """Simulated ones, over which the arrays are divided."""
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


def main() -> None:
    """Makes a state, saves it, reads the peak."""
    args = cli(MemoryArgs, description=__doc__)
    import jax
    import jax.numpy as jnp

    from vla_jax.checkpoint import Checkpoints

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = jax.make_mesh((args.devices,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    parts = {
        part: {
            name: jax.device_put(
                jax.random.normal(jax.random.fold_in(jax.random.key(p), i), shape),
                jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)),
            )
            for i, (name, (shape, axes)) in enumerate(shapes(args.gib, args.devices).items())
        }
        for p, part in enumerate(("params", "mu", "nu", "ema"))
    }
    moments = {"mu": parts["mu"], "nu": parts["nu"]}
    items = jax.block_until_ready({"params": parts["params"], "ema": parts["ema"], "opt_state": moments})
    del parts, moments  # which would keep the arrays that training gives away
    state = sum(x.nbytes for x in jax.tree.leaves(items))
    half = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.5, tree), donate_argnums=0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.save(
            0, {"params": {"w": jnp.ones(1000)}}, {"config": {}}
        )  # loads what a first save loads
        checkpoints.wait()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        blocking, whole = [], []
        for step in range(1, args.saves + 1):
            start = time.perf_counter()
            checkpoints.save(step, items, {"config": {}})
            blocking.append(time.perf_counter() - start)
            items = jax.block_until_ready(half(items))  # training goes on and gives the old arrays away
            checkpoints.wait()
            whole.append(time.perf_counter() - start)
        peak = memory("VmHWM") - before
        checkpoints.close()
    limit = 1.3 * state + 2**30
    report = {
        "state_gib": state / 2**30,
        "peak_above_before_gib": peak / 2**30,
        "peak_over_state": peak / state,
        "limit_gib": limit / 2**30,
        "within": peak <= limit,
        "blocking_seconds": blocking,
        "whole_seconds": whole,
        "devices": f"{args.devices} simulated CPU devices",
    }
    print(json.dumps(report, indent=2))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if not report["within"]:
        print(f"error: the peak is {peak / 2**30:.2f} GiB, the bar {limit / 2**30:.2f} GiB", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
