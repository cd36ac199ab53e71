"""Freezing, LoRA, groups: what moves, what does not, and what a step of each is in formulas."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models import small
from vla_jax.checkpoint.tree import flatten, join, split
from vla_jax.config import TrainConfig
from vla_jax.data.augment import AugmentConfig
from vla_jax.data.config import DataConfig
from vla_jax.flow.processes import make_process
from vla_jax.layers import lora
from vla_jax.layers.matrices import matrix_axes
from vla_jax.models.kinds import of_kind
from vla_jax.models.vla import VLA
from vla_jax.objectives.config import ObjectiveConfig
from vla_jax.sharding import MeshConfig, make_mesh
from vla_jax.sharding.rules import path_name
from vla_jax.train.config import LoopConfig, LoraConfig, OptimConfig
from vla_jax.train.optim import make_optimizer
from vla_jax.train.parts import init_params, make_parts, network
from vla_jax.train.patterns import choose, fits, leaf_names
from vla_jax.train.run import check_trunks
from vla_jax.train.state import state_builder
from vla_jax.train.step import make_train_step
from vla_jax.types import Given

CONFIG = small.config()
DATA = small.batch(CONFIG)


def names_of(tree):
    return {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def shapes():
    return jax.eval_shape(init_params(VLA(CONFIG), DATA), jax.random.key(0))


def test_patterns():
    assert fits("backbone/img/head/kernel", "backbone/img/**")
    assert fits("backbone/llm/layers/attn/q_einsum/w", "**/attn/*/w")
    assert (
        fits("expert/action_in_proj/bias", "expert/*_proj/bias") and fits("a/b", "**/b") and fits("b", "**/b")
    )
    assert not fits("backbone/llm/layers/mlp/linear", "backbone/*")
    assert not fits("backbone/img_x/w", "backbone/img/**") and not fits("a.b", "a?b")
    with pytest.raises(ValueError, match=r"optim.freeze: .*for all below it write 'backbone/img/\*\*'"):
        choose(["backbone/img/head/kernel"], ["backbone/img"], "optim.freeze")
    with pytest.raises(ValueError, match="'bakbone/llm/\\*\\*'; the nearest is 'backbone/llm'"):
        choose(["backbone/llm/layers/w"], ["bakbone/llm/**"], "x")


def test_split_and_join_are_inverse():
    tree = {"a": {"x": 1, "y": 2}, "b": 3, "c": {"d": {"e": 4}}}
    parts = split(tree, {"a/y", "c/d/e"}.__contains__)
    assert parts == ({"a": {"y": 2}, "c": {"d": {"e": 4}}}, {"a": {"x": 1}, "b": 3})
    assert join(*parts) == tree and join(tree, None) is tree
    with pytest.raises(ValueError, match="'b' is in both"):
        join(tree, {"b": 1})


def test_lora_is_a_low_rank_matrix_over_all_heads():
    """For every matrix of the network: A·B by tensordot over the flattened axes, its rank, and zero at the start."""
    params = nn.unbox(jax.eval_shape(lambda: nn.unbox(small.init(CONFIG, DATA)[1])))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    names = {name for name in flatten(params) if matrix_axes(name)}
    assert len(names) > 20
    with_factors = lora.attach(jax.random.key(0), params, names, rank=2)
    started = flatten(lora.merge(with_factors, 3.0))
    assert all(np.array_equal(started[name], leaf) for name, leaf in flatten(params).items())
    flat = flatten(with_factors)
    for name, w in flatten(params).items():
        if name not in names:
            assert f"{name}_lora/a" not in flat
            continue
        into, outof = matrix_axes(name)
        a, b = flat[f"{name}_lora/a"], rng.normal(size=flat[f"{name}_lora/b"].shape)
        found = np.asarray(lora.product(name, a, b.astype(np.float32)))
        assert found.shape == w.shape
        order = [*range(w.ndim - len(into) - len(outof)), *(i % w.ndim for i in (*into, *outof))]
        inputs = int(np.prod([w.shape[i] for i in into]))
        matrices = found.transpose(order).reshape(-1, inputs, int(np.prod([w.shape[i] for i in outof])))
        wanted = a.reshape(len(matrices), inputs, 2) @ b.reshape(len(matrices), 2, -1)
        np.testing.assert_allclose(matrices, wanted, rtol=1e-4, atol=1e-5)
        assert np.linalg.matrix_rank(matrices[0], tol=1e-3) == min(2, *matrices[0].shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(optim=OptimConfig(freeze=("**",))), "leaves nothing to train"),
        (
            dict(optim=OptimConfig(freeze=("backbone/image/**",))),
            "optim.freeze: no parameter .*backbone/img'",
        ),
        (dict(lora=LoraConfig(rank=2, modules=("**/scale",))), "names no matrix"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_parts(init_params(VLA(CONFIG), DATA), TrainConfig(model=CONFIG, **changes))


@pytest.mark.parametrize("kind", ["joint", "tokens"])
def test_lora_s_rank_alone_is_enough(kind):
    """Whatever the model has of backbone and expert layers is adapted; the expert's projections train as a whole."""
    cfg = dataclasses.replace(CONFIG, expert=of_kind(CONFIG.expert, kind, "model.expert"))
    data = DataConfig(ignore_state=kind == "tokens")
    config = TrainConfig(model=cfg, data=data, lora=LoraConfig(rank=2))
    parts = make_parts(init_params(VLA(cfg), DATA), config)
    names = leaf_names(jax.eval_shape(parts.init, jax.random.key(0)))
    trained = {name for name in names if name not in parts.frozen}
    whole = {name for name in trained if not lora.is_factor(name)}
    adapted = {name.partition("_lora/")[0] for name in trained - whole}
    assert adapted == {name for name in parts.frozen if matrix_axes(name) is not None}
    assert {name.partition("/")[0] for name in adapted} == {"backbone", "expert"} - {
        kind == "tokens" and "expert"
    }
    assert all(name.startswith("expert/") and "/layers/" not in name for name in whole)
    assert bool(whole) == (kind == "joint")


@pytest.mark.parametrize("text", ["backbone/**", ":2", "a/**:x", "a/**:0", "a/**:1:-1", "a:1:1:1"])
def test_groups_are_checked(text):
    with pytest.raises(ValueError, match=r"optim.groups: .* is not pattern:factor"):
        OptimConfig(groups=(text,))


def test_groups_scale_rates_and_clip_alone():
    """Against AdamW of each group by itself: factor times its step, its gradient clipped to its own norm."""
    params = {
        "backbone": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
        "expert": {"kernel": jnp.ones(4)},
    }
    rng = np.random.default_rng(0)
    gradients = [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * s, jnp.float32), params) for s in (9, 1)
    ]
    base = OptimConfig(learning_rate=0.1, warmup_fraction=0, hold_fraction=1, clip_norm=0.5, eps=1.0)
    config = dataclasses.replace(base, groups=("backbone/bias:0.5", "expert/**:2:0.03"))

    def moved(config, params, gradients):
        tx = make_optimizer(config, 10)
        state, updates = tx.init(params), None
        for i, g in enumerate(gradients):
            updates, state = tx.update(g, state, params, step=i)
        return updates

    found = moved(config, params, gradients)
    alone = moved(base, {"backbone": params["backbone"]}, [{"backbone": g["backbone"]} for g in gradients])
    np.testing.assert_allclose(found["backbone"]["kernel"], alone["backbone"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(found["backbone"]["bias"], 0.5 * alone["backbone"]["bias"], rtol=1e-5)
    tight = dataclasses.replace(base, clip_norm=0.03)
    expert = moved(tight, {"expert": params["expert"]}, [{"expert": g["expert"]} for g in gradients])
    np.testing.assert_allclose(found["expert"]["kernel"], 2 * expert["expert"]["kernel"], rtol=1e-5)
    assert (
        np.abs(found["expert"]["kernel"] - 2 * moved(base, params, gradients)["expert"]["kernel"]).max()
        > 1e-3
    )
    with pytest.raises(ValueError, match=r"optim.groups .*: no parameter is called 'expert/img/\*\*'"):
        make_optimizer(dataclasses.replace(base, groups=("expert/img/**:2",)), 10).init(params)


def config(**changes):
    return TrainConfig(
        model=CONFIG,
        objective=ObjectiveConfig(),
        augment=AugmentConfig(),
        **{"train": LoopConfig(batch_size=3, steps=4, ema_decay=0.5), **changes},
    )


def prepare(cfg):
    parts = make_parts(init_params(VLA(CONFIG), DATA), cfg)
    tx = make_optimizer(cfg.optim, 4)
    builder = state_builder(
        parts.init,
        tx,
        ema=True,
        mesh=make_mesh(MeshConfig()),
        frozen=parts.frozen,
        frozen_dtype=cfg.optim.frozen_dtype,
    )
    _, params = small.init(CONFIG, DATA)
    state = builder.init(jax.random.key(0), flatten(params))
    step = jax.jit(make_train_step(VLA(CONFIG), make_process(cfg.process), cfg, tx))
    return parts, state, step, params


@pytest.fixture(scope="module")
def tuned():
    """Image encoder frozen, LoRA on the decoder, the expert trained as a whole at twice the rate; two steps."""
    cfg = config(
        optim=OptimConfig(
            learning_rate=1e-2,
            warmup_fraction=0,
            hold_fraction=1,
            freeze=("backbone/img/**",),
            frozen_dtype="bfloat16",
            groups=("expert/**:2:1",),
            clip="per_group",
        ),
        lora=LoraConfig(rank=2, alpha=4.0, modules=("backbone/llm/**",)),
    )
    parts, state, step, params = prepare(cfg)
    after, metrics = step(state, DATA)
    after, _ = step(after, DATA)
    return cfg, parts, state, after, metrics, params


def test_what_is_frozen_stays_and_has_no_state(tuned):
    _, parts, state, after, _, params = tuned
    assert parts.frozen == {name for name in flatten(params) if name.startswith("backbone/")}
    frozen = flatten(after.frozen)
    assert set(frozen) == parts.frozen
    for name, leaf in flatten(state.frozen).items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(frozen[name]), np.asarray(leaf), err_msg=name)
    trained = set(flatten(after.params))
    assert all(name.startswith("expert/") or lora.is_factor(name) for name in trained)
    for tree in (
        after.ema,
        *(m for m in jax.tree.leaves(after.opt_state, is_leaf=lambda x: isinstance(x, dict))),
    ):
        if isinstance(tree, dict):
            assert set(flatten(tree)) == trained
    moments = optax.tree.get(after.opt_state, "mu")
    assert set(flatten(moments)) == trained


def test_what_is_trained_moves(tuned):
    _, _, state, after, _, _ = tuned
    before, now = flatten(state.params), flatten(after.params)
    still = {name for name, leaf in now.items() if np.array_equal(leaf, before[name])}
    assert not still, still
    whole = flatten(after.whole(averaged=True))
    assert set(whole) == set(now) | set(flatten(after.frozen))


def test_step_0_with_lora_is_the_model_without(tuned):
    """The losses of the first step are those of the same weights, frozen ones rounded, without any of this."""
    cfg, parts, _, _, metrics, params = tuned
    plain = config(optim=cfg.optim.__class__(learning_rate=1e-2))
    tx = make_optimizer(plain.optim, 4)
    rounded = {
        name: leaf.astype(jnp.bfloat16).astype(jnp.float32) if name in parts.frozen else leaf
        for name, leaf in flatten(params).items()
    }
    builder = state_builder(init_params(VLA(CONFIG), DATA), tx, ema=True, mesh=make_mesh(MeshConfig()))
    same = builder.init(jax.random.key(0), rounded)
    _, wanted = jax.jit(make_train_step(VLA(CONFIG), make_process(plain.process), plain, tx))(same, DATA)
    for name in ("loss", "text_loss", "action_loss"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-6)


def test_merged_equals_unmerged(tuned):
    """x·W + s·(x·A)·B, summed apart, against x·(W + s·A·B): on the trained factors of every matrix."""
    cfg, _, _, after, _, _ = tuned
    whole = flatten(after.whole(averaged=False))
    merged = flatten(lora.merge(after.whole(averaged=False), cfg.lora.scale))
    assert set(merged) == {name for name in whole if not lora.is_factor(name)}
    rng = np.random.default_rng(0)
    adapted = [name for name in merged if f"{name}_lora/a" in whole]
    assert len(adapted) == 5
    for name in adapted:
        into, outof = matrix_axes(name)
        w, a, b = (np.asarray(whole[n], np.float64) for n in (name, f"{name}_lora/a", f"{name}_lora/b"))
        assert np.abs(b).max() > 0
        lead = w.ndim - len(into) - len(outof)
        order = [*range(lead), *(i % w.ndim for i in (*into, *outof))]
        inputs = int(np.prod([w.shape[i] for i in into]))
        matrix = w.transpose(order).reshape(*w.shape[:lead], inputs, -1)
        both = np.asarray(merged[name], np.float64).transpose(order).reshape(matrix.shape)
        a, b = a.reshape(*w.shape[:lead], inputs, 2), b.reshape(*w.shape[:lead], 2, -1)
        x = rng.normal(size=(*w.shape[:lead], 4, inputs))
        np.testing.assert_allclose(x @ both, x @ matrix + 2.0 * (x @ a) @ b, rtol=1e-4, atol=1e-5)


def with_factors(cfg, *, size=0.3, rank=2):
    """A model with A and B beside every matrix, all of them random: (trained, frozen, their names)."""
    data, model, rng = small.batch(cfg), VLA(cfg), np.random.default_rng(0)

    def create(key):
        params = nn.unbox(init_params(model, data)(key))
        return lora.attach(key, params, {name for name in flatten(params) if matrix_axes(name)}, rank=rank)

    shapes = jax.eval_shape(create, jax.random.key(0))
    params = jax.tree.map(lambda x: size * rng.normal(size=x.shape).astype(np.float32), shapes)
    return data, model, *split(params, lora.is_factor)


def outputs(network, params, data):
    """Logits and actions."""
    cache, hidden = network.apply({"params": params}, data, method="prefill")
    call = (cache, Given.of(data), data.actions, jnp.full(data.state.shape[:1], 0.3))
    logits = network.apply({"params": params}, hidden, method="logits")
    return logits, network.apply({"params": params}, *call, method="denoise")


@pytest.mark.parametrize("remat", ["none", "dots_with_no_batch_dims_saveable"])
def test_the_network_computes_what_merged_weights_compute(remat):
    """Every matrix adapted, in float32: outputs and the gradients of all A and B, against W + s·A·B as weights."""
    cfg = dataclasses.replace(small.config(time="adarms"), remat=remat)
    data, model, factors, frozen = with_factors(cfg)
    adapted = network(model, frozen, 2.0)

    class Merged:
        def apply(self, variables, *args, **kwargs):
            merged = lora.merge(join(variables["params"], frozen), 2.0)
            return model.apply({"params": merged}, *args, **kwargs)

    def loss(factors, network):
        found = outputs(network, factors, data)
        return sum(jnp.sum(jnp.square(x)) for x in found), found

    step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (gradient, found), (wanted_gradient, wanted) = step(factors, adapted), step(factors, Merged())
    chex.assert_trees_all_close(found, wanted, rtol=1e-3, atol=1e-3)
    gradient = flatten(gradient)
    for name, leaf in flatten(wanted_gradient).items():
        assert np.linalg.norm(gradient[name] - leaf) < 1e-3 * np.linalg.norm(leaf), name
    assert all(np.ptp(x) > 0.1 for x in found)


def test_trunks_that_are_frozen_are_refused_only_where_they_are_used(tuned):
    _, _, state, _, _, _ = tuned
    check_trunks(ObjectiveConfig(), state.params)
    with pytest.raises(ValueError, match=r"of the trained parameters.*backbone/img"):
        weighting = dataclasses.replace(ObjectiveConfig().diagnostics, every=10, trunk=("backbone/img",))
        check_trunks(ObjectiveConfig(diagnostics=weighting), state.params)


def test_nothing_frozen_is_the_model_itself():
    model = VLA(CONFIG)
    assert network(model, None, 0.0) is model
