"""Muon: which parameters it moves, and the step against a singular value decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.models.small import batch, config, init
from vla_jax.sharding.rules import path_name
from vla_jax.train.muon import MEANINGFUL, RMS, matrix_axes, scale_by_muon

VECTORS_AND_TABLES = ("bias", "scale", "input_embedding", "pos_embedding")


def network():
    return init(config(), batch(config()))[1]


def leaves_with_axes(params):
    axes = matrix_axes(params)
    return [
        (path_name(path), leaf, path_value(axes, path))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]


def path_value(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_every_matrix_of_the_network_has_its_axes():
    for name, leaf, axes in leaves_with_axes(network()):
        *modules, last = name.split("/")
        if last in VECTORS_AND_TABLES or set(modules) & set(MEANINGFUL):
            assert axes is None, name
            continue
        inputs, outputs = (np.atleast_1d(side) % leaf.ndim for side in axes)
        matrix = set(inputs) | set(outputs)
        assert len(matrix) == len(inputs) + len(outputs), name
        batch = [leaf.shape[i] for i in range(leaf.ndim) if i not in matrix]
        assert len(batch) <= 2, name  # layers; and keys beside values, gate beside input


def test_step_turns_every_direction_at_one_speed():
    """For G = U S Vᵀ the step is U D Vᵀ with all of D near RMS · √max(m, n)."""
    gradient = np.random.default_rng(0).normal(size=(3, 24, 40)).astype(np.float32)  # three matrices
    params = {"mlp": {"linear": jnp.zeros((3, 24, 40))}}
    tx = scale_by_muon(0.9, 0.95, 1e-8, "float32")
    update, _ = tx.update({"mlp": {"linear": jnp.asarray(gradient)}}, tx.init(params), params)
    for g, u in zip(gradient, np.asarray(update["mlp"]["linear"])):
        left, _, right = np.linalg.svd(g, full_matrices=False)
        turned = left.T @ u @ right.T / (RMS * 40**0.5)
        np.testing.assert_allclose(turned - np.diag(np.diag(turned)), 0, atol=2e-3)
        assert (np.diag(turned) > 0.6).all() and (np.diag(turned) < 1.3).all()


def test_heads_are_one_matrix():
    """q_einsum [layers n d e] is d → n·e: the same step as for the plain matrix."""
    gradient = jax.random.normal(jax.random.key(0), (2, 4, 16, 8))
    flat = gradient.transpose(0, 2, 1, 3).reshape(2, 16, 32)
    tx = scale_by_muon(0.9, 0.95, 1e-8, "float32")
    heads, plain = (
        tx.update(tree, tx.init(tree), tree)[0]
        for tree in ({"q_einsum": {"w": gradient}}, {"mlp": {"linear": flat}})
    )
    np.testing.assert_allclose(
        heads["q_einsum"]["w"].transpose(0, 2, 1, 3).reshape(2, 16, 32), plain["mlp"]["linear"], atol=1e-6
    )


def test_the_rest_is_adam():
    params = {"norm": {"scale": jnp.ones(5)}, "action_out_proj": {"kernel": jnp.ones((4, 3))}}
    gradients = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) - 2, params)
    muon, adam = scale_by_muon(0.8, 0.9, 1e-6, "float32"), optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-6)
    states = [muon.init(params), adam.init(params)]
    for _ in range(3):
        (ours, states[0]), (theirs, states[1]) = (
            tx.update(gradients, state, params) for tx, state in zip((muon, adam), states)
        )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_state_holds_nothing_but_moments_and_counters():
    params = network()
    state = scale_by_muon(0.9, 0.95, 1e-8, "bfloat16").init(params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)} | {()}
    assert {leaf.shape for leaf in jax.tree.leaves(state)} <= shapes
