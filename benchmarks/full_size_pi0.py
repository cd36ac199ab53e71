"""π0 at full size on a CPU machine: built, saved, loaded, sampled, converted to two other formats and back.

    python -m benchmarks.full_size_pi0 --folder /data/full_size        # needs 24 GB of disk

3,238,048,528 random parameters in bfloat16 (6.5 GB). Each phase is a process of its own, so that its peak is its
own: the largest resident memory (VmHWM), and the largest that is not a file's pages (RssAnon, every 20 ms). The bound
of a conversion is its largest array and 1 GiB, above the process at its start. That the weights come back bit for bit
is shown by their checksums. Sampling: three 224-pixel cameras, a prompt of 48 tokens, 10 Euler steps.
"""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla_jax.cli.command import cli, run

FORMATS = ("pi0_hf", "openpi")
Phase = Literal["all", "build", "sample", "to_pi0_hf", "from_pi0_hf", "to_openpi", "from_openpi"]
PHASES: tuple[Phase, ...] = ("build", "sample", "to_pi0_hf", "from_pi0_hf", "to_openpi", "from_openpi")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Where, and how large."""

    folder: Path
    """An empty or new folder for the weights; it is removed at the end of `--phase all`."""
    preset: Literal["pi0", "pi0_tiny"] = "pi0"
    """pi0_tiny to try the script."""
    phase: Phase = "all"
    """One phase by itself; they follow each other."""
    steps: int = 10
    """Solver steps."""
    text_tokens: int = 48
    """Length of the prompt."""
    json: Path = Path("benchmarks/results/full_size_pi0.json")
    """File for the numbers."""


class Peak:
    """The peak of this process's memory from here on; `with Peak() as peak: …; peak.grown`."""

    def __enter__(self) -> "Peak":
        self.start, self.peak, self._done = anonymous(), anonymous(), threading.Event()
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._done.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        """Bytes above the start."""
        return self.peak - self.start

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    """Bytes of this process that are not a file's pages."""
    return _status("RssAnon")


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def model_of(preset: str):
    """The model; the twin gets a vocabulary and dimensions, which data would decide."""
    from vla_jax.models.presets import PRESETS

    model = PRESETS[preset]()
    return (
        model
        if model.backbone.text.vocab
        else dataclasses.replace(
            model,
            backbone=dataclasses.replace(
                model.backbone, text=dataclasses.replace(model.backbone.text, vocab=300)
            ),
            dtype="bfloat16",
        )
    )


def build(args: Args) -> dict[str, Any]:
    """Random weights on the device, array by array, then a checkpoint as training writes it."""
    import jax
    import jax.numpy as jnp

    from vla_jax.checkpoint import Checkpoints
    from vla_jax.checkpoint.tree import nest
    from vla_jax.config import TrainConfig, to_json
    from vla_jax.convert.model import our_shapes

    model = model_of(args.preset)

    @jax.jit
    def rounded(x):
        return (0.02 * x).astype(jnp.bfloat16)

    def draw(key, shape: tuple[int, ...]):
        """Layer by layer, so that no float32 of a whole stack is ever there."""
        if len(shape) < 3:
            return rounded(jax.random.normal(key, shape))
        rows = [rounded(jax.random.normal(k, shape[1:])) for k in jax.random.split(key, shape[0])]
        return jnp.stack(rows)

    with Peak() as made:
        shapes = our_shapes(model, expert=True)
        keys = jax.random.split(jax.random.key(0), len(shapes))
        params = nest({name: draw(k, shape) for k, (name, shape) in zip(keys, shapes.items())})
        jax.block_until_ready(params)
    with Peak() as saved:
        checkpoints = Checkpoints(args.folder / "ours", keep=1)
        checkpoints.save(0, {"params": params}, {"config": json.loads(to_json(TrainConfig(model=model)))})
        checkpoints.close()
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "bytes": sum(sizes),
        "largest_array": max(sizes),
        "build": numbers(made),
        "save": numbers(saved),
    }


def sample(args: Args) -> dict[str, Any]:
    """Loads what was saved and samples a chunk, twice: the first call compiles."""
    import jax
    import jax.numpy as jnp

    from vla_jax.checkpoint import load_params
    from vla_jax.flow.config import ProcessConfig, SolverConfig
    from vla_jax.flow.processes import make_process
    from vla_jax.models.vla import VLA
    from vla_jax.serve.sampling import sample_actions
    from vla_jax.types import Batch

    model = model_of(args.preset)
    with Peak() as loaded:
        params = load_params(args.folder / "ours").params
        jax.block_until_ready(params)
    rng, size = np.random.default_rng(0), model.backbone.vision.image_size
    valid = np.ones((1, args.text_tokens), bool)
    batch = Batch(
        images={n: rng.integers(0, 256, (1, size, size, 3), dtype=np.uint8) for n in model.cameras},
        image_mask={n: np.ones(1, bool) for n in model.cameras},
        state=rng.normal(size=(1, model.expert.state_dim)).astype(np.float32),
        tokens=rng.integers(4, model.backbone.text.vocab, valid.shape).astype(np.int32),
        token_mask=valid,
        token_causal=~valid,
        token_loss=~valid,
    )
    arguments = dict(
        model=VLA(model),
        process=make_process(ProcessConfig()),
        solver=SolverConfig(method="euler", num_steps=args.steps),
        samples=1,
        plan_visible=False,
    )
    keys = [jax.random.split(jax.random.key(seed), len(valid)) for seed in range(2)]
    with Peak() as compiled:
        program = sample_actions.lower(params, batch, keys[0], **arguments).compile()
    calls = []
    for draw in keys:
        with Peak() as called:
            chunk = np.asarray(program(params, batch, draw))
        calls.append(numbers(called))
        if not np.isfinite(chunk).all() or chunk.shape[2:] != (model.expert.horizon, model.expert.action_dim):
            raise ValueError(f"the sampled chunk {chunk.shape} is not finite, or not a chunk")
    return {
        "load": numbers(loaded),
        "compile": numbers(compiled),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "sample": calls,
        "chunk": list(jnp.asarray(chunk).shape),
    }


def export(args: Args, target: str) -> dict[str, Any]:
    """Ours to another library's files."""
    from vla_jax.convert import convert

    with Peak() as peak:
        convert(args.folder / "ours", args.folder / target, source="vla_jax", target=target)
    return {f"to_{target}": numbers(peak)}


def read_back(args: Args, source: str) -> dict[str, Any]:
    """And back; the checksum of the parameters must be the first one's. What was read is removed."""
    from vla_jax.checkpoint import read_meta
    from vla_jax.convert import convert

    again = args.folder / "again"
    with Peak() as peak:
        convert(args.folder / source, again, source=source, target="vla_jax")
    first, last = (read_meta(folder)["fingerprints"]["params"] for folder in (args.folder / "ours", again))
    if first != last:
        raise ValueError(f"the weights came back changed: checksum {last}, was {first}")
    shutil.rmtree(again)
    shutil.rmtree(args.folder / source)
    return {f"from_{source}": numbers(peak), "same_checksum": True}


def numbers(peak: Peak) -> dict[str, Any]:
    """What a phase took."""
    return {
        "seconds": round(peak.seconds, 2),
        "start_bytes": peak.start,
        "grown_bytes": peak.grown,
        "process_peak_bytes": _status("VmHWM"),
    }


def everything(args: Args) -> None:
    """All phases, each in a process of its own; then a table."""
    if args.folder.exists() and any(args.folder.iterdir()):
        raise ValueError(
            f"{args.folder} is not empty; give a new folder, since this one is removed at the end"
        )
    args.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"preset": args.preset, "steps": args.steps}
    try:
        for phase in PHASES:
            part = args.folder / f"{phase}.json"
            options = ["--folder", args.folder, "--preset", args.preset, "--phase", phase, "--json", part]
            options += ["--steps", str(args.steps), "--text-tokens", str(args.text_tokens)]
            command = [sys.executable, "-m", "benchmarks.full_size_pi0", *map(str, options)]
            if subprocess.run(command, check=False).returncode:
                raise ValueError(f"phase {phase} failed")
            found |= json.loads(part.read_text())
            print(f"{phase} done", flush=True)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    bound = found["largest_array"] + 2**30
    found["conversion_bound_bytes"] = bound
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{found['parameters']:,} parameters, {found['bytes'] / 2**30:.2f} GiB")
    print("| phase | s | grown by | peak of the process |\n|---|--:|--:|--:|")
    rows = {name: found[name] for name in ("build", "save", "load", "compile")}
    rows |= {"first chunk": found["sample"][0], "second chunk": found["sample"][1]}
    rows |= {f"{way} {name}": found[f"{way}_{name}"] for name in FORMATS for way in ("to", "from")}
    for name, row in rows.items():
        gib = [row[key] / 2**30 for key in ("grown_bytes", "process_peak_bytes")]
        print(f"| {name} | {row['seconds']:.1f} | {gib[0]:.2f} GiB | {gib[1]:.2f} GiB |")
    print(f"\nbound of a conversion: {bound / 2**30:.2f} GiB above its start")


def main() -> None:
    """All phases, or one."""
    args = cli(Args, description=__doc__)
    if args.phase == "all":
        everything(args)
        return
    phases = {"build": build, "sample": sample}
    for name in FORMATS:
        phases |= {
            f"to_{name}": functools.partial(export, target=name),
            f"from_{name}": functools.partial(read_back, source=name),
        }
    args.json.write_text(json.dumps(phases[args.phase](args)), encoding="utf-8")


if __name__ == "__main__":
    run(main)
