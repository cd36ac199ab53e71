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
from vla_jax.serve.compiled.policy import CompiledPolicy
from vla_jax.serve.policy import Policy

KEY = jax.random.key(3)
SOLVER = SolverConfig(num_steps=2)
PI0, PI05, BOTH = ("mlp", True, "forward"), ("adarms", False, "forward"), ("adarms", True, "reversed")
PUBLIC = ("mlp", True, "reversed")
INPUTS = ("cameras", "prompt", "embeddings")
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
    compiled = CompiledPolicy(policy, CompileConfig(rewrites=rewrites, buckets=(8,)))
    found = compiled.act(observation(), KEY, solver=SOLVER)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.ptp(expected) > 0.1
    (shape,) = compiled.compiler.shapes
    assert [name for name, _, _ in shape.cameras] == (["top"] if "cameras" in on else ["top", "wrist"])
    assert shape.length == (16 if "prompt" in on else 48)


def test_what_is_rewritten_at_load_is_gone_from_the_weights():
    """The switches do what they say: each removes or reshapes what it folds."""
    policy, _ = plain(*PI0)

    def weights(**on):
        return CompiledPolicy(policy, CompileConfig(rewrites=Rewrites.none(**on))).compiler.weights

    before = weights()
    layer = before["text"]["layers"]
    assert layer["attn_norm"] is not None and len(layer["qkv"]) == len(layer["up"]) == 2
    assert weights(norms=True)["text"]["layers"]["attn_norm"] is None
    fused = weights(fuse=True)["text"]["layers"]
    assert (fused["qkv"][0].shape, fused["up"][0].shape) == ((2, 24, 6, 8), (2, 24, 2, 32))
    assert weights(projections=True)["expert"]["action_in"]["kernel"].shape == (5, 16)
    assert "mix_actions" in before["expert"] and "mix_actions" not in weights(projections=True)["expert"]
    assert isinstance(weights(unstack=True)["expert"]["layers"], list)
    last = weights(last_layer=True)["text"]
    assert last["layers"]["down"].shape[0] == 1 and set(last["last"]) == {"attn_norm", "qkv"}
    assert "embedding" in before["text"] and "embedding" not in weights(embeddings=True)["text"]
    assert before["vision"]["patch"].ndim == 4 and weights(patches=True)["vision"]["patch"].ndim == 2
