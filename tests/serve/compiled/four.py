"""The compiled policy on 4 simulated devices; prints one JSON object. See test_compiled_policy.py."""

import dataclasses
import json

import jax
import numpy as np

from tests.serve import toy
from tests.serve.compiled.test_compiled_policy import KEY, SOLVER, make
from vla_jax.serve.compiled.config import CompileConfig
from vla_jax.sharding import MeshConfig, make_mesh


def main() -> None:
    policy, observation = make(), toy.observe(2)
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    config = CompileConfig(buckets=(2,))
    found = {}
    for name, how in {"gap": config, "int8_gap": dataclasses.replace(config, weights="int8")}.items():
        one, four = policy.compiled(how), policy.compiled(how, mesh=mesh)
        expected = one.act(observation, KEY, solver=SOLVER)
        found[name] = float(np.abs(four.act(observation, KEY, solver=SOLVER) - expected).max())
        if name == "gap":
            (shape,) = four.runner.compiler.shapes
            text = four.runner.compiler.executable(shape).as_text()
            found |= {"all_reduces": text.count(" all-reduce("), "all_gathers": text.count(" all-gather(")}
            leaves = jax.tree.leaves([four.params["backbone"]["llm"][f"layers_{i}"] for i in range(2)])
            shards = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
            found["share"] = shards / sum(leaf.nbytes for leaf in leaves)
    try:
        policy.compiled(config, mesh=make_mesh(MeshConfig(data=1, tensor=4)))
        found["refused"] = ""
    except ValueError as error:
        found["refused"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
