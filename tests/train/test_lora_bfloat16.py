"""LoRA in bfloat16 beside float32, on a base that is exact in bfloat16, at 2.5e-5: after 1, 20 and 200 steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import small
from vla_jax.checkpoint.tree import flatten, join
from vla_jax.config import TrainConfig
from vla_jax.flow.processes import make_process
from vla_jax.layers import lora
from vla_jax.models.vla import VLA
from vla_jax.sharding import MeshConfig, make_mesh
from vla_jax.train.config import LoopConfig, LoraConfig, OptimConfig
from vla_jax.train.optim import make_optimizer
from vla_jax.train.parts import init_params, make_parts, network
from vla_jax.train.state import state_builder
from vla_jax.train.step import make_train_step
from vla_jax.types import Given

STEPS = (1, 20, 200)
CONFIG = TrainConfig(
    model=dataclasses.replace(small.config(), dtype="bfloat16"),
    optim=OptimConfig(
        learning_rate=2.5e-5, warmup_fraction=0, hold_fraction=1, weight_decay=0, frozen_dtype="bfloat16"
    ),
    lora=LoraConfig(rank=4, alpha=8.0),
    train=LoopConfig(batch_size=3, steps=200, ema_decay=None),
)


@pytest.fixture(scope="module")
def trained():
    """The states after `STEPS`, by the real step."""
    model, data, mesh = VLA(CONFIG.model), small.batch(CONFIG.model), make_mesh(MeshConfig())
    parts, tx = make_parts(init_params(model, data), CONFIG), make_optimizer(CONFIG.optim, 200)
    builder = state_builder(
        parts.init, tx, ema=False, mesh=mesh, frozen=parts.frozen, frozen_dtype=CONFIG.optim.frozen_dtype
    )
    _, params = small.init(CONFIG.model, data)
    state = builder.init(jax.random.key(0), flatten(params))
    step = jax.jit(make_train_step(model, make_process(CONFIG.process), CONFIG, tx))
    states = {0: state}
    for i in range(1, 201):
        state, metrics = step(state, data)
        assert not metrics["skipped"]
        if i in STEPS:
            states[i] = state
    return states


@pytest.fixture(scope="module")
def answers(trained):
    """dtype → a jitted function of trained and frozen parameters: logits and actions of 256 samples."""
    data = small.batch(CONFIG.model, b=256, seed=5)
    where = np.asarray(data.token_mask), np.asarray(data.action_mask)

    def of(dtype):
        model = VLA(dataclasses.replace(CONFIG.model, dtype=dtype))

        @jax.jit
        def answer(params, frozen):
            adapted = network(model, frozen, CONFIG.lora.scale)
            cache, hidden = adapted.apply({"params": params}, data, method="prefill")
            t = jnp.full(data.state.shape[:1], 0.3)
            call = (cache, Given.of(data), data.actions, t)
            logits = adapted.apply({"params": params}, hidden, method="logits")
            return logits, adapted.apply({"params": params}, *call, method="denoise")

        return lambda *args: [np.asarray(x, np.float64)[m] for x, m in zip(answer(*args), where)]

    return {dtype: of(dtype) for dtype in ("float32", "bfloat16")}


def without_effect(params):
    """The same parameters with B = 0."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "_lora" in str(path) and path[-1].key == "b" else x, params
    )


@pytest.mark.parametrize(("steps", "near"), [(20, 0.1), (200, 0.02)])
def test_the_whole_network_moves_as_in_float32(trained, answers, steps, near):
    """How much of the effect of A·B on the network's outputs is there: single numbers are rounded to 8 bits in every
    layer, which averages out over the outputs of many samples. After few steps too little does to measure 2 %."""
    state = trained[steps]

    def effect(dtype):
        on, off = (answers[dtype](p, state.frozen) for p in (state.params, without_effect(state.params)))
        return [a - b for a, b in zip(on, off)]

    for found, wanted in zip(effect("bfloat16"), effect("float32")):
        assert abs(np.sum(found * wanted) / np.sum(wanted**2) - 1) < near


@pytest.mark.parametrize("steps", STEPS)
def test_every_matrix_adds_what_it_adds_in_float32(trained, steps):
    """Each adapted matrix by itself, through its module's own product: within 2 %."""
    from vla_jax.layers.linear import Matrix, low_rank_equations, multiply

    equations = {
        "q_einsum/w": "btd,nde->btne",
        "kv_einsum/w": "btd,cmde->btcme",
        "attn_vec_einsum/w": "btne,ned->btd",
        "gating_einsum": "btd,cdf->btcf",
        "linear": "btd,df->btf",
    }
    state, rng, seen = trained[steps], np.random.default_rng(0), 0
    whole = flatten(lora.scaled(join(state.params, state.frozen), CONFIG.lora.scale))
    for name, w in whole.items():
        equation = next((e for end, e in equations.items() if name.endswith(end)), None)
        if equation is None or not name.startswith(("backbone/llm", "expert/layers")):
            continue
        seen += 1
        matrix = Matrix(*(jnp.asarray(x)[0] for x in (w, whole[f"{name}_lora/a"], whole[f"{name}_lora/b"])))
        letters, inner = (
            equation.split(",")[0],
            matrix.a.shape[:-1][-(equation.split(",")[0].count("n") + 1) :],
        )
        x = jnp.asarray(rng.normal(size=(400, 400, *inner)[: 2 + len(inner)]), jnp.bfloat16)
        assert x.ndim == len(letters)
        narrow, widen = low_rank_equations(equation, matrix.a.ndim)
        wanted = np.asarray(jnp.einsum(widen, jnp.einsum(narrow, x.astype(jnp.float32), matrix.a), matrix.b))
        on, off = (np.asarray(multiply(equation, x, m), np.float32) for m in (matrix, Matrix(matrix.w)))
        assert abs(np.vdot(on - off, wanted) / np.vdot(wanted, wanted) - 1) < 0.02, name
        alone = multiply(equation, x, dataclasses.replace(matrix, w=jnp.zeros_like(matrix.w)))
        assert np.linalg.norm(alone - wanted) < 0.01 * np.linalg.norm(wanted), name
    assert seen == 10
