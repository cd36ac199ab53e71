"""Runs on 8 simulated devices, in a process of its own; prints one JSON object. See test_sharding.py."""

import json
import re
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vla_jax.objectives import cross_entropy as module
from vla_jax.sharding import MeshConfig, activate, make_mesh

MESHES = {"8x1x1x1": (8, 1, 1, 1), "1x8x1x1": (1, 8, 1, 1), "2x2x1x2": (2, 2, 1, 2), "1x2x2x2": (1, 2, 2, 2)}
ROWS, LENGTH, WIDTH, VOCAB = 16, 6, 8, 202
COLLECTIVE = re.compile(
    r"= \(?(\w+)\[([\d,]*)\].* (all-gather|all-reduce|reduce-scatter|all-to-all|collective-\w+)\("
)


def inputs(rows):
    rng = np.random.default_rng(0)
    hidden, table = (rng.normal(size=s).astype(np.float32) for s in ((rows, LENGTH, WIDTH), (VOCAB, WIDTH)))
    labels = rng.integers(0, VOCAB, (rows, LENGTH))
    labels[:, 0] = VOCAB - 1  # the last device's last token
    return table, hidden, labels, rng.random((rows, LENGTH)) < 0.7


def loss(table, hidden, labels, valid):
    found = module.cross_entropy(table, hidden, labels, valid)
    return found.loss, found.correct


gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def relative(found, wanted):
    return max(
        float(np.abs(np.asarray(f) - w).max() / np.abs(w).max())
        for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted))
    )


def compare(found, wanted):
    ((loss, correct), grads), ((want, right), want_grads) = found, wanted
    return {
        "loss": relative(loss, want),
        "gradient": relative(grads, want_grads),
        "correct": float(abs(correct - right)),
    }


def elements(text):
    return int(np.prod([int(n) for n in text.split(",") if n]))


def in_loops(program: str) -> dict:
    """The largest collective, in elements, of the computations that are bodies of loops, and of what these call."""
    computations = dict(re.findall(r"^%?([\w.\-]+) \(.*?\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL))
    todo, seen = re.findall(r"body=%?([\w.\-]+)", program), set()
    loops = len(todo)
    while todo:
        name = todo.pop()
        if name not in seen and name in computations:
            seen.add(name)
            todo += re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", computations[name])
    sizes = [elements(size) for name in seen for _, size, _ in COLLECTIVE.findall(computations[name])]
    return {"loops": loops, "largest": max(sizes, default=0)}


def main() -> None:
    cases = {"split": inputs(ROWS), "few rows": inputs(3)}
    module.PIECE = 10**9
    wanted = {name: jax.tree.map(np.asarray, jax.jit(gradient)(*given)) for name, given in cases.items()}
    out: dict = {}
    for name, sizes in MESHES.items():
        mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "sequence", "tensor"), sizes))))
        out[name] = {"cases": {}}
        with activate(mesh):
            for case, given in cases.items():
                table = jax.device_put(given[0], NamedSharding(mesh, P("tensor", ("fsdp", "sequence"))))
                for how, piece in (("at once", 10**9), ("in pieces", 2 * ROWS * VOCAB // 4)):
                    module.PIECE = piece
                    program = (
                        jax.jit(lambda *x: gradient(*x)).lower(table, *given[1:]).compile()
                    )  # a new PIECE
                    found = program(table, *given[1:])
                    out[name]["cases"][f"{case}, {how}"] = compare(found, wanted[case])
                    if (case, how) == ("split", "in pieces"):
                        pieces = in_loops(program.as_text())
        if name in ("1x8x1x1", "2x2x1x2"):
            positions = max(1, module.PIECE // (ROWS // sizes[0] * -(-VOCAB // (8 // sizes[0]))))
            out[name]["pieces"] = pieces | {
                "hidden": ROWS // sizes[0] * min(positions, LENGTH) * WIDTH,
                "table": VOCAB * WIDTH,
            }
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
