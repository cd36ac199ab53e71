"""What a training step with LoRA takes, and how much of LoRA's effect bfloat16 leaves, beside another checkout.

python -m benchmarks.lora_bfloat16 --other ../before --out benchmarks/results/lora_bfloat16.json

Each measurement is a process of its own in one of the two checkouts, in turn, so that what else the machine does meets
both; ratios are of neighbours. `--worker` is such a process.

- step: median of some steps of the real step; memory: what XLA plans for its arguments and temporaries;
- kept: of the effect of A·B on logits and actions in float32, the share that is there in bfloat16 after 1, 20 and 200
  steps at 2.5e-5: Σ(e16·e32) / Σ(e32²), e the outputs less those with B = 0. Rounding beside the effect averages out.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

STEPS = (1, 20, 200)


def config(width: int, remat: str):
    """A model of some width whose base is exact in bfloat16, LoRA on all it adapts by default."""
    from vla_jax.config import TrainConfig
    from vla_jax.models.backbones.paligemma import PaliGemmaConfig
    from vla_jax.models.config import VLAConfig
    from vla_jax.models.encoders.siglip import VisionConfig
    from vla_jax.models.experts.joint import JointConfig
    from vla_jax.models.gemma import TextConfig
    from vla_jax.train.config import LoopConfig, LoraConfig, OptimConfig

    model = VLAConfig(
        backbone=PaliGemmaConfig(
            vision=VisionConfig(image_size=32, patch=8, width=width, depth=4, mlp=4 * width, heads=4),
            text=TextConfig(
                vocab=512, width=width, depth=4, mlp=4 * width, heads=4, kv_heads=1, head_dim=width // 4
            ),
        ),
        expert=JointConfig(width=width // 2, mlp=2 * width, horizon=8, action_dim=7, state_dim=7),
        cameras=("base",),
        dtype="bfloat16",
        remat=remat,
    )
    rate = dict(learning_rate=2.5e-5, warmup_fraction=0.0, hold_fraction=1.0, weight_decay=0.0)
    return TrainConfig(
        model=model,
        optim=OptimConfig(**rate, frozen_dtype="bfloat16"),
        lora=LoraConfig(rank=16, alpha=16.0),
        train=LoopConfig(batch_size=16, steps=STEPS[-1], ema_decay=None),
    )


def worker(width: int, remat: str, effect: bool) -> dict:
    """Measures this checkout."""
    import jax

    from benchmarks.train_step import random_batch
    from vla_jax.aot import programs
    from vla_jax.sharding import MeshConfig, activate, make_mesh

    cfg, mesh = config(width, remat), make_mesh(MeshConfig())
    builder = programs.plan(cfg, programs.abstract_batch(cfg, mesh), mesh)
    state, batch = builder.init(jax.random.key(0)), random_batch(cfg, mesh)
    lowered = programs.lower(cfg, mesh, "train").lowered
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    found = {"temporaries": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes, "kept": {}}
    times, total = [], STEPS[-1] if effect else 8
    with activate(mesh):
        for i in range(1, total + 1):
            begin = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begin)
            if effect and i in STEPS:
                found["kept"][str(i)] = kept(cfg, mesh, state)
    return found | {"step": statistics.median(times[2:])}


def kept(cfg, mesh, state) -> dict[str, float]:
    """Shares of the effect on logits and actions, over other samples than those of training."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.train_step import random_batch
    from vla_jax.models.vla import VLA
    from vla_jax.train.parts import network

    data = random_batch(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=256)), mesh)

    def effect(dtype: str) -> list:
        model = VLA(dataclasses.replace(cfg.model, dtype=dtype))

        @jax.jit
        def answer(params):
            adapted, t = network(model, state.frozen, cfg.lora.scale), jnp.full(data.state.shape[:1], 0.3)
            cache, hidden = adapted.apply({"params": params}, data, method="prefill")
            call = (cache, data.state, data.actions, t, data.action_mask)
            logits = adapted.apply({"params": params}, hidden, method="logits")
            return logits, adapted.apply({"params": params}, *call, method="denoise")

        off = jax.tree_util.tree_map_with_path(
            lambda path, x: 0 * x if "_lora" in str(path) and path[-1].key == "b" else x, state.params
        )
        pair = answer(state.params), answer(off)
        return [np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in zip(*pair)]

    names = ("logits", "actions")
    return {
        name: float(np.sum(e16 * e32) / np.sum(e32**2))
        for name, e16, e32 in zip(names, effect("bfloat16"), effect("float32"))
    }


def main() -> None:
    """Runs both checkouts in turn and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", type=Path, help="the checkout to compare with")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="timings per checkout and remat")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("REMAT", "EFFECT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        json.dump(worker(args.width, args.worker[0], args.worker[1] == "yes"), sys.stdout)
        return
    if args.other is None:
        raise SystemExit("--other DIR: give the checkout to compare with")

    def run(where: Path, remat: str, effect: str) -> dict:
        command = [sys.executable, __file__, "--width", str(args.width), "--worker", remat, effect]
        environment = os.environ | {"PYTHONPATH": str(where.absolute())}
        done = subprocess.run(command, env=environment, cwd=where, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(done.stdout)

    def write() -> None:
        if args.out:
            args.out.write_text(json.dumps(out, indent=2) + "\n")

    places, out = {"here": Path.cwd(), "other": args.other}, {"width": args.width, "steps": {}}
    for remat in ("none", "dots_with_no_batch_dims_saveable", "nothing_saveable"):
        rounds = [
            {name: run(where, remat, "no") for name, where in places.items()} for _ in range(args.rounds)
        ]
        out["steps"][remat] = {
            "milliseconds": {
                n: round(1e3 * statistics.median(r[n]["step"] for r in rounds), 1) for n in places
            },
            "ratio": round(statistics.median(r["here"]["step"] / r["other"]["step"] for r in rounds), 3),
            "temporaries_mb": {n: round(rounds[0][n]["temporaries"] / 1e6, 1) for n in places},
        }
        write()
    out["kept"] = {name: run(where, "none", "yes")["kept"] for name, where in places.items()}
    write()
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
