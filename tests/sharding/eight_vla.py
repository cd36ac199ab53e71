"""Runs the real model on 8 simulated devices, in a process of its own; prints one JSON object."""

import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from tests.convert import layouts
from tests.models import small
from vla_jax.checkpoint.tree import flatten
from vla_jax.convert import Options, load
from vla_jax.convert.convert import open_weights
from vla_jax.flow.config import ProcessConfig
from vla_jax.flow.processes import make_process
from vla_jax.layers.attention import attend, prefix_lm
from vla_jax.layers.axes import constrain
from vla_jax.models.backbones.encoder import EncoderConfig
from vla_jax.models.config import VLAConfig
from vla_jax.models.experts.dit import DitConfig
from vla_jax.models.vla import VLA
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.objective import Objective
from vla_jax.sharding import MeshConfig, activate, batch_sharding, make_mesh, placement
from vla_jax.sharding.config import AXES
from vla_jax.train.parts import init_params
from vla_jax.train.prefetch import to_device
from vla_jax.train.state import state_builder

MESHES = {
    "1": (1, 1, 1, 1),
    "8x1x1": (8, 1, 1, 1),
    "1x8x1": (1, 8, 1, 1),
    "2x2x2": (2, 2, 1, 2),
    "2x2x2x1": (2, 2, 2, 1),
}

COLLECTIVE = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def splash() -> float:
    """Largest difference between attention on a mesh and on one device."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(4, 12, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 4, 12, 1, 8)).astype(np.float32)
    valid, causal = rng.random((4, 12)) < 0.9, np.arange(12)[None] >= np.array([[3], [6], [9], [12]])

    def attention(q, k, v):
        return attend(q, k, v, prefix_lm(valid, causal), backend="splash", length="prefix")

    alone = jax.jit(attention)(q, k, v)
    with activate(make_mesh(MeshConfig(data=2, fsdp=1, sequence=2, tensor=2))):
        spread = jax.jit(attention)(q, k, v)
    return float(np.abs(np.where(valid[..., None, None], alone - spread, 0)).max())


def converted() -> dict[str, Any]:
    """A PaliGemma's file straight onto a mesh of 2 × 2 × 2: what each device holds of each array."""
    sizes = dataclasses.replace(layouts.TINY, vocab=64)
    arrays = layouts.random(layouts.big_vision(sizes))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pt.npz"
        np.savez(path, **arrays)
        cfg = open_weights(path, "big_vision", Options()).model
        cfg = dataclasses.replace(cfg, expert=dataclasses.replace(cfg.expert, action_dim=4, state_dim=4))
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        init = init_params(VLA(cfg), small.batch(cfg, b=8))
        shardings = flatten(state_builder(init, optax.sgd(1.0), ema=False, mesh=mesh).shardings.params)
        shardings = {name: x for name, x in shardings.items() if name.startswith("backbone/")}
        found = flatten(load(path, source="big_vision", shardings=shardings))
    wrong = [
        name
        for name, array in arrays.items()
        for shard in found[f"backbone/{name}"].addressable_shards
        if shard.data.shape != shardings[f"backbone/{name}"].shard_shape(array.shape)
        or not np.array_equal(shard.data, array[shard.index])
    ]
    names = ("llm/layers/mlp/linear", "llm/embedder/input_embedding", "img/pos_embedding")
    return {
        "wrong": wrong,
        "arrays": len(found) - len(arrays),
        "shards": {n: found[f"backbone/{n}"].addressable_shards[0].data.shape for n in names},
        "share": sum(x.addressable_shards[0].data.nbytes for x in found.values())
        / sum(x.nbytes for x in found.values()),
    }


def on_meshes(cfg: VLAConfig, objective: ObjectiveConfig, meshes: Iterable[str]) -> dict[str, Any]:
    """Loss, gradient and layout of a model on some meshes, beside those on the first."""
    model = VLA(cfg)
    objective = Objective(model=model, process=make_process(ProcessConfig()), config=objective)
    host = jax.tree.map(np.asarray, small.batch(cfg, b=8))

    def loss(params, batch):
        drawn = objective.draw(jax.random.key(1), batch)
        return objective.losses(params, batch, drawn, objective.counts(batch, drawn)).total

    out: dict[str, Any] = {}
    for name in meshes:
        shape = MESHES[name]
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = make_mesh(MeshConfig(**dict(zip(AXES, shape))), devices)
        builder = state_builder(init_params(model, host), optax.sgd(1.0), ema=False, mesh=mesh)
        params = builder.init(jax.random.key(0)).params
        batch = to_device(host, batch_sharding(mesh))
        with activate(mesh):
            step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, builder.shardings.params))
            lowered = step.lower(params, batch)
            compiled = lowered.compile()
            value, gradient = compiled(params, batch)
        gradient = jax.tree.map(np.asarray, gradient)
        if name == "1":
            first = value, gradient
        table = placement(builder.shapes.params, builder.shardings.params, mesh)
        pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(first[1])))
        largest = max(np.abs(b).max() for _, b in pairs)
        out[name] = {
            "loss": abs(float(value) / float(first[0]) - 1),
            "gradient": float(max(np.abs(a - b).max() for a, b in pairs) / largest),
            "constraints": lowered.as_text().count("sdy.sharding_constraint"),
            "unsharded": table.unsharded_share,
            "collectives": sorted(set(re.findall(COLLECTIVE, compiled.as_text()))),
        }
        if name == "2x2x2x1":  # the residual stream of the prefix, as the model constrains it
            with activate(mesh):
                split = jax.jit(lambda x: constrain(x, ("batch", "prefix", "act_embed")))
                x = split(np.zeros((8, 16, 4), np.float32))
            out[name]["prefix_shards"] = 16 // x.addressable_shards[0].data.shape[1]
    return out


def main() -> None:
    out = on_meshes(small.config(), ObjectiveConfig(), MESHES)
    dit = DitConfig(width=24, heads=4, mlp=40, horizon=5, action_dim=3, state_dim=4)
    backbone = EncoderConfig(vision=small.config().backbone.vision, width=32)
    cfg = dataclasses.replace(small.config(), backbone=backbone, expert=dit)
    out["encoder"] = on_meshes(cfg, ObjectiveConfig(text=False), ("1", "8x1x1", "1x8x1", "2x2x2", "2x2x2x1"))
    out["splash"] = splash()
    out["converted"] = converted()
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
