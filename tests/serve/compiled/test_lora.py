"""A policy with LoRA's factors: the plain one and the compiled one, with every rewrite, do not round them away."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.serve import toy
from vla_jax.checkpoint.tree import flatten
from vla_jax.flow.config import SolverConfig
from vla_jax.layers import lora
from vla_jax.layers.linear import TURNED
from vla_jax.layers.matrices import matrix_axes
from vla_jax.serve.compiled.config import CompileConfig, Rewrites
from vla_jax.serve.policy import Policy

KEY, SOLVER = jax.random.key(3), SolverConfig(num_steps=2)


def policy(time: str, dtype: str, *, b: float = 0.3, merged: bool = False) -> Policy:
    """Every matrix adapted."""
    cfg = toy.config()
    expert = dataclasses.replace(cfg.model.expert, time=time)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, expert=expert, dtype=dtype))
    params, rng = toy.random_params(cfg), np.random.default_rng(1)
    # as converted weights are
    params = jax.tree.map(lambda x: np.asarray(jax.numpy.asarray(x, "bfloat16"), np.float32), params)
    names = {name for name in flatten(params) if matrix_axes(name)}
    params = lora.attach(jax.random.key(0), params, names, rank=3)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: rng.normal(size=x.shape).astype(np.float32) * b if path[-1].key == "b" else x, params
    )
    params = lora.merge(params, 1.0) if merged else params
    return Policy(config=cfg, bundle=toy.bundle(), params=params, step=0, batch_size=2)


def act(policy: Policy) -> np.ndarray:
    return policy.act(toy.observe(2), KEY, solver=SOLVER)


@pytest.fixture(scope="module", params=["mlp", "adarms"])
def exact(request):
    """The kind of expert, and the actions of merged weights in float32."""
    return request.param, act(policy(request.param, "float32", merged=True))


def test_float32_is_the_merged_policy(exact):
    time, wanted = exact
    plain = policy(time, "float32")
    np.testing.assert_allclose(act(plain), wanted, atol=1e-5)
    np.testing.assert_allclose(act(plain.compiled()), wanted, atol=1e-5)


@pytest.mark.parametrize("on", [dict.fromkeys(Rewrites.names(), True), {}], ids=["all", "none"])
def test_factors_go_through_every_rewrite(exact, on):
    """In bfloat16, where they stay apart: the plain policy's actions, of which they are a large part."""
    time, wanted = exact
    plain = policy(time, "bfloat16")
    compiled = plain.compiled(CompileConfig(rewrites=Rewrites.none(**on), buckets=(2,)))
    assert len(factors(compiled)) >= 2 * 9
    error = np.sqrt(np.mean((act(compiled) - wanted) ** 2))
    effect = np.sqrt(np.mean((act(policy(time, "float32", b=0.0)) - wanted) ** 2))
    assert error < 0.15 * effect


def test_int8_keeps_them_too(exact):
    """A step of the integers is far above a small correction: they hold W alone."""
    time, _ = exact
    small = policy(time, "bfloat16", b=2.5e-5)
    compiled = small.compiled(CompileConfig(weights="int8"))
    leaves = flatten(compiled.params)
    beside = {name.rpartition("_lora/")[0] for name in factors(compiled) if "layers" in name}
    assert beside and all(leaves[kept(name, leaves)].dtype == np.int8 for name in beside)
    assert np.isfinite(act(compiled)).all()


def factors(policy: Policy) -> list[str]:
    return [name for name in flatten(policy.params) if lora.is_factor(name)]


def kept(name: str, leaves: dict) -> str:
    """Where a matrix lies, whatever the order of its axes."""
    return name if name in leaves else name + TURNED
