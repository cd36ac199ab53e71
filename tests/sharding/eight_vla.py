"""Runs the real model on 8 simulated devices, in a process of its own; prints one JSON object."""

import json
import sys

import jax
import numpy as np
import optax

from tests.models import small
from vla_jax.flow.config import ProcessConfig
from vla_jax.flow.processes import make_process
from vla_jax.models.vla import VLA
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.objectives.transfusion import count, draw, transfusion_loss
from vla_jax.sharding import MeshConfig, activate, batch_sharding, make_mesh, placement
from vla_jax.train.prefetch import to_device
from vla_jax.train.run import init_params
from vla_jax.train.state import state_builder

MESHES = {"1": (1, 1, 1), "8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}


def main() -> None:
    cfg = small.config()
    model, process, objective = VLA(cfg), make_process(ProcessConfig()), ObjectiveConfig()
    host = jax.tree.map(np.asarray, small.batch(cfg, b=8))

    def loss(params, batch):
        draws = draw(jax.random.key(1), batch, process, objective)
        return transfusion_loss(
            model, process, objective, params, batch, draws, count(batch, objective)
        ).total

    out = {}
    for name, shape in MESHES.items():
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), shape))), devices)
        builder = state_builder(init_params(model, host), optax.sgd(1.0), ema=False, mesh=mesh)
        params = builder.init(jax.random.key(0)).params
        batch = to_device(host, batch_sharding(mesh))
        with activate(mesh):
            step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, builder.shardings.params))
            lowered = step.lower(params, batch)
            value, gradient = step(params, batch)
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
        }
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
