"""Every rewrite by itself, and all together, give the plain policy's actions up to rounding."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.serve import toy
from vla_jax.cli.random_policy import random_params
from vla_jax.flow.config import SolverConfig
from vla_jax.serve.compiled.config import CompileConfig, Rewrites
from vla_jax.serve.compiled.parameters import size_bytes
from vla_jax.serve.policy import Policy

KEY = jax.random.key(3)
SOLVER = SolverConfig(num_steps=2)
PI0, PI05, BOTH = ("mlp", True, "forward"), ("adarms", False, "forward"), ("adarms", True, "reversed")
PUBLIC = ("mlp", True, "reversed")
INPUTS = ("cameras", "prompt")
"""What the network is given; `shape` below says that each of them did something."""
ALL = tuple(Rewrites.names())
CASES = [
    *(
        (PI0, (name,)) for name in ALL if name not in (*INPUTS, "reuse")
    ),  # reuse: one robot, test_compiled_policy.py
    (PI0, INPUTS),
    (PI05, ("time", "unstack")),
    (BOTH, ("state",)),
    (PUBLIC, ("time",)),
    *((model, ALL) for model in (PI0, PI05, BOTH)),
    (BOTH, ()),
]


@functools.cache
def plain(time: str, state_token: bool, clock: str) -> tuple[Policy, np.ndarray]:
    """A policy whose robot has fewer dimensions than the model, and its actions."""
    cfg = toy.config()
    expert = dataclasses.replace(
        cfg.model.expert, time=time, state_token=state_token, clock=clock, action_dim=5, state_dim=4
    )
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, expert=expert, unroll=1),
        data=dataclasses.replace(cfg.data, ignore_state=not state_token),
    )
    transforms = tuple(
        dataclasses.replace(t, action_dim=5, state_dim=4) if type(t).__name__ == "PadDims" else t
        for t in toy.bundle().transforms
    )
    bundle = dataclasses.replace(toy.bundle(), transforms=transforms)
    params = random_params(cfg.model, bundle, seed=0)
    policy = Policy(config=cfg, bundle=bundle, params=params, step=0, batch_size=8)
    return policy, policy.act(observation(), KEY, solver=SOLVER)


def observation():
    """Two robots (padded to 8) that lack a camera: there is something to leave out."""
    seen = toy.observe(2)
    return dataclasses.replace(seen, images=seen.images | {"wrist": None})


@pytest.mark.parametrize(("model", "on"), CASES, ids=lambda x: "+".join(map(str, x)) if len(x) < 9 else "all")
def test_a_rewrite_changes_nothing_but_rounding(model, on):
    policy, expected = plain(*model)
    rewrites = Rewrites.none(**dict.fromkeys(on, True))
    compiled = policy.compiled(CompileConfig(rewrites=rewrites, buckets=(8,)))
    found = compiled.act(observation(), KEY, solver=SOLVER)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.ptp(expected) > 0.1
    (shape,) = compiled.runner.compiler.shapes
    assert [name for name, _, _ in shape.cameras] == (["top"] if "cameras" in on else ["top", "wrist"])
    assert shape.length == (16 if "prompt" in on else 48)


def test_layers_lie_apart_only_where_asked_for():
    policy, _ = plain(*PI0)

    def names(**on) -> set[str]:
        return set(policy.compiled(CompileConfig(rewrites=Rewrites.none(**on))).params["expert"])

    assert "layers" in names() and not {"layers_0", "layers_1"} & names()
    assert "layers" not in names(unstack=True) and {"layers_0", "layers_1"} <= names(unstack=True)


def test_the_last_prefix_layer_stops_at_its_keys_and_values_where_layers_lie_apart():
    """The prefill then does not even take the last decoder layer's feed-forward weights."""
    policy, _ = plain(*PI0)
    taken = {}
    for apart in (False, True):
        compiled = policy.compiled(CompileConfig(rewrites=Rewrites.none(unstack=apart), buckets=(2,)))
        (shape,) = compiled.runner.shapes(SOLVER)
        compiler = compiled.runner.compiler
        inputs, _ = compiler.abstract(shape)
        prefill = jax.jit(
            lambda params, inputs, on=(compiler, shape): on[0].program.prefill(params, inputs, on[1])
        )
        taken[apart] = prefill.lower(compiler.params, inputs).compile().memory_analysis()
    left_out = taken[False].argument_size_in_bytes - taken[True].argument_size_in_bytes
    assert left_out >= size_bytes(compiled.params["backbone"]["llm"]["layers_1"]["mlp"]) > 0
