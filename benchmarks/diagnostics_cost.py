"""What comparing the two losses' gradients costs: the training step without it and with it in every 10th step.

python -m benchmarks.diagnostics_cost --config configs/tabletop.py --out benchmarks/results/diagnostics_cost.json

Both programs run in turn, in blocks of 10 steps on the same batches, so that whatever else slows the machine hits both.
Off is the same program as before, text for text (tests/objectives); so only "on" is compared with "off".
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np

from vla_jax.cli.config_file import load_config
from vla_jax.objectives.config import DiagnosticsConfig
from vla_jax.sharding import activate, batch_sharding, make_mesh
from vla_jax.train.prefetch import to_device
from vla_jax.train.run import loader_of, make_job, prepare_data, resolve

EVERY = 10


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/tabletop.py")
    parser.add_argument("--data", default="data/tabletop")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--stride", type=int, help="samples compared: every n-th; default: the field's own")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base = load_config(args.config)
    base = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, path=args.data),
        train=dataclasses.replace(base.train, log_every=EVERY),
    )
    bundle = prepare_data(base)
    base = resolve(base, bundle)
    stride = args.stride or DiagnosticsConfig().stride
    mesh = make_mesh(base.mesh)
    loader = loader_of(base, bundle, "train")
    batches = [to_device(loader.batch(i), batch_sharding(mesh)) for i in range(EVERY)]
    steps, states = {}, {}
    for name, every in (("off", 0), ("on", EVERY)):
        objective = dataclasses.replace(
            base.objective, diagnostics=DiagnosticsConfig(every=every, stride=stride)
        )
        job = make_job(dataclasses.replace(base, objective=objective), bundle, mesh)
        states[name] = job.builder.init(job.key)
        with activate(mesh):
            lowered = jax.jit(job.train_step, donate_argnums=0).lower(states[name], batches[0])
            steps[name] = lowered.compile()

    taken = {name: [] for name in steps}
    for block in range(args.blocks + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            for batch in batches:
                states[name], metrics = step(states[name], batch)
                jax.block_until_ready(metrics)
            if block:  # the first one warms up
                taken[name].append((time.perf_counter() - begin) / EVERY)
    ratios = np.array(taken["on"]) / np.array(taken["off"])
    found = {
        "config": args.config,
        "every": EVERY,
        "time_bins": DiagnosticsConfig().time_bins,
        "stride": stride,
        "samples_compared": -(-base.train.batch_size // stride),
        "blocks": args.blocks,
        "ms_per_step": {name: round(1e3 * float(np.median(t)), 2) for name, t in taken.items()},
        "cost_percent_median": round(100 * (float(np.median(ratios)) - 1), 1),
        "cost_percent_quartiles": [round(100 * (float(q) - 1), 1) for q in np.percentile(ratios, [25, 75])],
    }
    print(json.dumps(found, indent=2))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
