"""Runs on 8 simulated devices, in a process of its own; prints one JSON object. See test_sharding.py."""

import json
import sys
import tempfile

import flax.linen as nn
import jax
import numpy as np
import tensorstore as ts

from tests.train.toy import host_batch, make_job, small_loop
from vla_jax.checkpoint import Checkpoints, load
from vla_jax.sharding import MeshConfig, activate, batch_sharding, placement
from vla_jax.train.prefetch import to_device

MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}


def gap(a, b) -> float:
    """Largest difference between two trees."""
    return max(
        float(np.max(np.abs(np.asarray(x) - np.asarray(y))))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def run(shape, steps=3):
    """State after init, after some steps, and the losses on a mesh."""
    loop = small_loop()
    job = make_job(loop, MeshConfig(**dict(zip(("data", "fsdp", "tensor"), shape))))
    state = start = job.builder.init(job.key)
    first = jax.tree.map(np.asarray, start)
    step = jax.jit(job.train_step, out_shardings=(job.builder.shardings, None))
    losses = []
    with activate(job.builder.mesh):
        for i in range(steps):
            batch = to_device(host_batch(i, loop.batch_size), batch_sharding(job.builder.mesh))
            lowered = step.lower(state, batch).as_text() if i == 0 else lowered
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return job, first, state, losses, lowered


def layout_on_disk() -> dict:
    """Chunks of a stack of layers whose second axis is divided, and whether it comes back."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    values = jax.random.normal(jax.random.key(0), (6, 64, 2048))
    divided = jax.device_put(values, jax.NamedSharding(mesh, jax.P(None, "fsdp")))
    with tempfile.TemporaryDirectory() as run_dir:
        checkpoints = Checkpoints(run_dir, keep=1)
        checkpoints.save(1, {"params": {"stack": divided}}, {"config": {}})
        checkpoints.close()
        store = {"driver": "ocdbt", "base": f"file://{run_dir}/checkpoints/1/params/", "path": "stack/"}
        stored = ts.open({"driver": "zarr", "kvstore": store}).result()
        found = load(run_dir, "params")["stack"]
    return {"chunk": stored.chunk_layout.read_chunk.shape, "gap": gap(found, values)}


def main() -> None:
    out = {"on_disk": layout_on_disk()}
    devices = jax.devices()
    jax_devices = jax.devices
    jax.devices = lambda *args: devices[:1]  # a mesh of one, beside which the others are judged
    _, first, last, losses, _ = run((1, 1, 1))
    jax.devices = jax_devices
    with tempfile.TemporaryDirectory() as run_dir:
        for name, shape in MESHES.items():
            job, init, state, found, lowered = run(shape)
            table = placement(job.builder.shapes, job.builder.shardings, job.builder.mesh)
            kernel = state.params["backbone"]["kernel"]
            moment = state.opt_state[1].mu["backbone"]["kernel"]
            out[name] = {
                "init": gap(init, first),
                "params": gap(state, last),
                "loss": max(abs(a - b) for a, b in zip(losses, found)),
                "kernel": kernel.addressable_shards[0].data.shape,
                "moment": moment.addressable_shards[0].data.shape,
                "constraints": lowered.count("sdy.sharding_constraint"),
                "devices_bytes": table.device_bytes,
                "unsharded": table.unsharded_share,
            }
            if name == "8x1x1":
                checkpoints = Checkpoints(run_dir, keep=1)
                checkpoints.save(3, state.items(), {"config": {"a": 1}})
                checkpoints.close()
                saved = jax.tree.map(np.asarray, state.items())
            else:
                checkpoints = Checkpoints(run_dir, keep=1)
                restored = checkpoints.restore_latest(job.builder.shapes.items(), same={"config": {"a": 1}})
                checkpoints.close()
                again = restored.items["params"]["backbone"]["kernel"]
                out[name]["restored"] = gap(restored.items, saved)
                out[name]["restored_shards"] = (
                    again.sharding == job.builder.shardings.params["backbone"]["kernel"]
                )
        whole = load(run_dir, "ema")
        out["whole"] = gap(whole, saved["ema"])
        out["whole_devices"] = len(whole["backbone"]["kernel"].devices())
    unset = jax.jit(lambda x: nn.with_logical_constraint(x, ("batch", "act_mlp")))
    out["outside"] = unset.lower(np.zeros((8, 8))).as_text().count("sdy.sharding_constraint")
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
