"""λ policies of three losses and more against their papers' problems, solved in another way. Of two: test_weighting."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from vla_jax.objectives.weighting import (
    MGDA,
    CAGrad,
    GradientRatio,
    GradNorm,
    LossEma,
    PCGrad,
    Scheduled,
    Uncertainty,
    trunk,
)
from vla_jax.objectives.weighting.saved import bare, with_names

NAMES = ("text", "action", "depth", "image")


def lambdas(*values):
    return dict(zip(NAMES, values))


def vector(weights):
    """In the order of the names."""
    return np.array([float(weights[name]) for name in NAMES if name in weights])


def gradients(n, dims=4):
    entry = st.floats(-3, 3, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
    rows = st.lists(st.lists(entry, min_size=dims, max_size=dims), min_size=n, max_size=n)
    return rows.map(np.float64).filter(lambda g: (np.linalg.norm(g, axis=1) > 0.05).all())


several = st.integers(3, 4).flatmap(gradients)


def applied(policy, g, step=0):
    """Σ w_i g_i."""
    return vector(policy.weights(step, policy.init(), jnp.float32(g @ g.T)).trunk) @ g


@settings(max_examples=25, deadline=None, derandomize=True)
@given(several)
def test_mgda_is_the_shortest_combination(g):
    """The optimality conditions of the smallest norm over the simplex: no gradient has less than d's own square."""
    scales = np.array([1.0, 0.5, 2.0, 3.0])[: len(g)]
    scaled = scales[:, None] * g
    d = applied(MGDA(lambdas(*scales)), g) / len(g)
    size = (scaled**2).sum(1).max()
    assert (scaled @ d).min() >= d @ d - 2e-3 * size


def test_mgda_is_near_the_minimum_of_thousands():
    """What `SWEEPS` says of its own accuracy, against the best of many starts of another solver."""
    from vla_jax.objectives.weighting.mgda import shortest

    rng = np.random.default_rng(0)
    for n in (3, 4, 5):
        g = rng.normal(size=(300, n, 6)) * 10 ** rng.uniform(-1, 1, size=(300, n, 1))
        gram = g @ g.swapaxes(1, 2)
        w = np.asarray(jax.jit(jax.vmap(shortest))(jnp.float32(gram)), np.float64)
        assert (w >= 0).all() and np.abs(w.sum(1) - 1).max() < 1e-5
        d = np.einsum("bn,bnd->bd", w, g)
        # Duality: for every w the minimum is at least min_i g_i · d, minus what d itself is too long.
        gap = (d * d).sum(1) - np.einsum("bnd,bd->bn", g, d).min(1)
        assert (gap / np.einsum("bnn->bn", gram).max(1)).max() < 1e-4


@settings(max_examples=15, deadline=None, derandomize=True)
@given(several, st.sampled_from([0.3, 0.5, 0.9]))
def test_cagrad_is_the_best_for_the_worst_off(g, radius):
    """Within its ball, and with no smaller least descent than a general solver of the paper's primal problem finds."""
    d = applied(CAGrad(lambdas(*[1.0] * len(g)), radius), g) / len(g)
    mean = g.mean(0)
    length, size = np.linalg.norm(mean), (g**2).sum(1).max()
    assert np.linalg.norm(d - mean) <= radius * length + 1e-3 * np.sqrt(size)

    def dual(w):
        w = np.abs(w) / np.abs(w).sum()
        return w @ g @ mean + radius * length * np.linalg.norm(w @ g)

    starts = [np.full(len(g), 1 / len(g)), *(np.eye(len(g)) + 0.05)]
    least = min(minimize(dual, w, method="Nelder-Mead", options={"maxiter": 2000}).fun for w in starts)
    assert (g @ d).min() >= least - 5e-3 * size  # by strong duality the two are equal


@settings(max_examples=25, deadline=None, derandomize=True)
@given(gradients(3), st.integers(0, 5))
def test_pcgrad_projects_in_some_order(g, step):
    """Algorithm 1 written out for vectors: each gradient's result is that of one of the orders of the others."""

    def projected(i, order):
        own = g[i].copy()
        for j in order:
            own -= min(own @ g[j], 0) / (g[j] @ g[j]) * g[j]
        return own

    orders = [itertools.permutations([j for j in range(3) if j != i]) for i in range(3)]
    possible = [sum(projected(i, o) for i, o in enumerate(some)) for some in itertools.product(*orders)]
    got = applied(PCGrad(lambdas(1.0, 1.0, 1.0)), g, step)
    size = np.linalg.norm(g, axis=1).max() * (
        1 + np.linalg.norm(g, axis=1).max() / np.linalg.norm(g, axis=1).min()
    )
    assert min(np.abs(got - want).max() for want in possible) < 1e-4 * size


def test_pcgrad_takes_different_orders():
    g = np.array([[1.0, 0.0, 0.0], [-1.0, 0.5, 0.0], [-1.0, -0.6, 0.4]])
    policy = PCGrad(lambdas(1.0, 1.0, 1.0))
    assert len({tuple(applied(policy, g, step).round(4)) for step in range(20)}) > 1
    np.testing.assert_array_equal(applied(policy, g, 3), applied(policy, g, 3))


def test_gradnorm_balances_three():
    """With gradients and losses that stand still: G_i / G_1 = λ_i / λ_1 · (r_i / r_1)^α, and Σ w = 3."""
    policy, norms = GradNorm(lambdas(1.0, 2.0, 0.5), 0.3, 1.5), np.array([4.0, 0.5, 2.0])
    first, later = (jax.tree.map(jnp.float32, lambdas(*x)) for x in ((2.0, 3.0, 1.0), (1.0, 0.6, 0.9)))
    gram = jnp.float32(np.diag(norms**2))
    state = policy.update(policy.init(), first, gram)
    for _ in range(200):
        state = policy.update(state, later, gram)
    w = vector(policy.weights(0, state, gram).trunk)
    assert w.sum() == pytest.approx(3, rel=1e-5)
    rates = np.array([0.5, 0.2, 0.9])
    want = np.array([1.0, 2.0, 0.5]) * (rates / rates[0]) ** 1.5
    np.testing.assert_allclose(w * norms / (w[0] * norms[0]), want, rtol=1e-4)
    # A loss that is missing leaves the others' balance as it is.
    missing = policy.update(state, later | {"action": jnp.float32(0)}, gram.at[1].set(0).at[:, 1].set(0))
    assert missing["log_ratio"]["action"] == state["log_ratio"]["action"]


def test_gradient_ratio_of_three():
    policy, norms = GradientRatio(lambdas(1.0, 2.0, 0.5)), np.array([4.0, 0.5, 2.0])
    w = vector(policy.weights(0, policy.init(), jnp.float32(np.diag(norms**2))).trunk)
    assert w[0] == 1
    np.testing.assert_allclose(w * norms / norms[0], [1, 2, 0.5], rtol=1e-6)


def test_losses_are_weighed_one_by_one():
    """What has no gradients treats three losses as it treats two: each by itself."""
    given, seen = lambdas(1.0, 2.0, 0.5), jax.tree.map(jnp.float32, lambdas(3.0, 0.5, 8.0))
    for kind, constant in ((Uncertainty, 0.1), (LossEma, 0.9)):
        policy = kind(given, constant)
        three = policy.update(policy.init(), seen, None)
        weights = policy.weights(1, three, None).trunk
        for name in ("action", "depth"):
            two = kind({n: given[n] for n in ("text", name)}, constant)
            alone = two.weights(
                1, two.update(two.init(), {n: seen[n] for n in two.lambdas}, None), None
            ).trunk
            assert alone[name] == weights[name] and alone["text"] == weights["text"]


def test_a_schedule_holds_all_but_the_text():
    policy = Scheduled(lambdas(1.0, 2.0, 0.5), 0.0, "linear", 10, 20)
    assert policy.is_zero(10) and not policy.is_zero(11)
    np.testing.assert_allclose(vector(policy.weights(15, None, None).trunk), [1, 1, 0.25])


def test_of_two_losses_the_state_is_what_runs_have_saved():
    """Checkpoints hold the one value by itself; of more it has names."""
    one = {"action": jnp.float32(2)}
    assert bare(one) == 2 and with_names(bare(one), ["action"]) == one
    more = lambdas(jnp.float32(1), jnp.float32(2))
    assert bare(more) is more and with_names(more, ["text", "action"]) is more
    paths = {
        name: {trunk.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(s)}
        for name, s in (
            ("gradnorm", GradNorm(lambdas(1.0, 2.0), 0.1, 1.0).init()),
            ("gradient_ratio", GradientRatio(lambdas(1.0, 2.0)).init()),
            ("uncertainty", Uncertainty(lambdas(1.0, 2.0), 0.1).init()),
            ("loss_ema", LossEma(lambdas(1.0, 2.0), 0.1).init()),
        )
    }
    both = {"text", "action"}
    assert paths == {
        "gradnorm": {"log_ratio", *(f"first/{n}" for n in both)},
        "gradient_ratio": {"weight"},
        "uncertainty": both,
        "loss_ema": {f"{k}/{n}" for k in ("loss", "total") for n in both},
    }
    # Old checksums weigh the arrays by their place: text comes before action, though JAX sorts plain dicts.
    (first, _), (second, _) = jax.tree_util.tree_leaves_with_path(Uncertainty(lambdas(1.0, 2.0), 0.1).init())
    assert (trunk.path_name(first), trunk.path_name(second)) == ("text", "action")
