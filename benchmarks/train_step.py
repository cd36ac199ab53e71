"""The full-parameter training step on the devices at hand: samples/s and MFU, at the largest batch that fits.

python -m benchmarks.train_step --config configs/pi0_pretrain.py --mesh.fsdp 1 --json benchmarks/results/train_step.json

python -m benchmarks.train_step --config tests/aot/tiny.py --mesh.fsdp 1 --batches 4 8     # on a CPU, in seconds

The true step (gradient, clipping, AdamW, EMA) on random data that never changes, so that nothing but the step is timed.
Batches are tried in the order given until one does not fit; each is timed for `steps` steps after two of warm-up, one
after the other without reading results in between.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

from vla_jax.cli.command import cli_with_config, run


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkArgs:
    """What to try."""

    batches: tuple[int, ...] = (8, 16, 32, 48, 64, 96, 128)
    """Global batch sizes, rising; the last one that fits is the largest."""
    steps: int = 20
    """Steps per timing."""
    repeats: int = 3
    """Timings per batch; the median counts, the spread is printed."""
    json: Path | None = None
    """File for the results."""

    def __post_init__(self):
        if not self.batches or min(self.batches) < 1 or list(self.batches) != sorted(set(self.batches)):
            raise ValueError(f"batches={self.batches}: give rising positive sizes")
        if self.steps < 1 or self.repeats < 1:
            raise ValueError(f"steps={self.steps}, repeats={self.repeats}: at least 1")


def main() -> None:
    """Times the step for each batch."""
    args, config = cli_with_config(BenchmarkArgs, description=__doc__)
    import jax

    from vla_jax.sharding import make_mesh

    mesh = make_mesh(config.mesh)
    devices = mesh.devices.reshape(-1)
    print(f"{len(devices)} × {devices[0].device_kind}, jax {jax.__version__}")
    results = []
    for batch in args.batches:
        sized = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))
        result = measure(sized, mesh, args.steps, args.repeats)
        if result is None:
            print(f"batch {batch}: does not fit")
            break
        results.append(result)
        mfu = "" if result["mfu"] is None else f", MFU {result['mfu']:.1%}"
        print(
            f"batch {batch}: {1e3 * result['step_seconds']:.1f} ms per step "
            f"({1e3 * result['fastest']:.1f} to {1e3 * result['slowest']:.1f}), "
            f"{result['samples_per_second']:.2f} samples/s{mfu}, compiled in {result['compile_seconds']:.0f} s",
            flush=True,
        )
    if not results:
        raise ValueError(
            f"not even a batch of {args.batches[0]} fits; use --model.remat nothing_saveable or more devices"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure(config, mesh, steps: int, repeats: int) -> dict | None:
    """Times one batch size; None where it does not fit."""
    import jax

    from vla_jax.aot import programs
    from vla_jax.sharding import activate, check_batch
    from vla_jax.train.flops import total_peak, train_flops
    from vla_jax.train.memory import out_of_memory

    programs.check_sizes(config)
    check_batch(config.train.batch_size, config.train.accumulate, mesh)
    builder = programs.plan(config, programs.abstract_batch(config, mesh), mesh)
    try:
        start = time.perf_counter()
        compiled = programs.lower(config, mesh, "train").lowered.compile()
        compile_seconds = time.perf_counter() - start
        state, batch = builder.init(jax.random.key(config.seed)), random_batch(config, mesh)
        times = []
        with activate(mesh):
            for timing in range(repeats + 1):
                count = 2 if timing == 0 else steps
                start = time.perf_counter()
                for _ in range(count):
                    state, metrics = compiled(state, batch)
                jax.block_until_ready(metrics)
                times.append((time.perf_counter() - start) / count)
    except jax.errors.JaxRuntimeError as error:
        if out_of_memory(error) is None and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    if not float(metrics["loss"]) == float(metrics["loss"]):
        raise ValueError("the loss is not a number: the timing would mean nothing")
    seconds = statistics.median(times[1:])
    peak = total_peak(mesh.devices.reshape(-1).tolist())
    rate, flops = config.train.batch_size / seconds, train_flops(config)
    return {
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.devices.size,
        "mesh": dict(mesh.shape),
        "batch": config.train.batch_size,
        "remat": config.model.remat,
        "attention": config.model.attention,
        "step_seconds": seconds,
        "fastest": min(times[1:]),
        "slowest": max(times[1:]),
        "samples_per_second": rate,
        "sample_flops": flops,
        "mfu": None if peak is None else rate * flops / peak,
        "peak_flops": peak,
        "loss": float(metrics["loss"]),
        "compile_seconds": compile_seconds,
    }


def random_batch(config, mesh):
    """A batch of noise with everything valid and, where text is learned, targets at its end."""
    import jax
    import numpy as np

    from vla_jax.aot.programs import abstract_batch

    shapes = abstract_batch(config, mesh)
    rng = np.random.default_rng(0)
    length, targets = config.data.max_text_tokens, config.data.max_target_tokens
    is_target = np.arange(length) >= length - (targets if config.objective.text else 0)

    def fill(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in ("token_causal", "token_loss"):
            value = np.broadcast_to(is_target, shape.shape)
        elif shape.dtype == bool:
            value = np.ones(shape.shape, bool)
        elif np.issubdtype(shape.dtype, np.integer):
            top = 256 if shape.dtype == np.uint8 else config.model.backbone.text.vocab
            value = rng.integers(0, top, shape.shape, dtype=shape.dtype)
        else:
            value = rng.normal(size=shape.shape).astype(shape.dtype)
        return jax.device_put(value, shape.sharding)

    return jax.tree_util.tree_map_with_path(fill, shapes)


if __name__ == "__main__":
    run(main)
