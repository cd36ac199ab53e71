"""Every λ policy on two quadratics whose Pareto front is known, and its rule against numpy.

    L_text = ½ ‖x - A‖² + F,   L_action = ½ ‖x - B‖² + F

with F = 0 unless said otherwise. The Pareto front is the segment x = A + θ (B - A), θ in [0, 1], and weights w
have their minimum at θ = w_action / (w_text + w_action).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.objectives.config import DiagnosticsConfig, ObjectiveConfig
from vla_jax.objectives.weighting import (
    MGDA,
    CAGrad,
    Fixed,
    GradientRatio,
    GradNorm,
    LossEma,
    PCGrad,
    Scheduled,
    Uncertainty,
    WeightingConfig,
    combine,
    make_weighting,
    per_loss,
    trunk,
)
from vla_jax.objectives.weighting.config import OPTIONS

A, B = np.array([1.0, -2.0, 0.5], np.float32), np.array([-1.0, 1.0, 2.0], np.float32)
START = np.array([2.0, 3.0, -1.0], np.float32)
RATE = 0.1


def two(action, text=1.0):
    """λ of two losses."""
    return {"text": text, "action": action}


def losses(x, floor=0.0):
    return two(0.5 * jnp.sum((x - B) ** 2) + floor, 0.5 * jnp.sum((x - A) ** 2) + floor)


def gram_of(gradients, inside):
    return trunk.gram_matrix(gradients, ("text", "action"), inside)


def values(named):
    return [named["text"], named["action"]]


def descend(policy, steps=600, floor=0.0, start=START):
    """Gradient descent under a policy: the last x, gradient and state."""

    def step(carry, i):
        x, state, _ = carry
        gradients, found = per_loss(lambda p: (losses(p["x"], floor),) * 2, {"x": x})
        gram = gram_of(gradients, {"x": True}) if policy.uses_gradients else None
        weights = policy.weights(i, state, gram)
        gradient = combine(weights, gradients, {"x": True})["x"]
        return (x - RATE * gradient, policy.update(state, found, gram), gradient), weights.trunk

    first = (jnp.asarray(start), policy.init(), jnp.zeros(3))
    (x, state, gradient), weights = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))(first)
    return np.asarray(x), np.asarray(gradient), state, jax.tree.map(np.asarray, weights)


def front(x):
    """θ of the nearest point of the front's line, and the distance to it."""
    theta = float((x - A) @ (B - A) / ((B - A) @ (B - A)))
    return theta, float(np.linalg.norm(x - A - theta * (B - A)))


def assert_at(x, theta, atol=1e-4):
    found, distance = front(x)
    assert distance < atol
    assert found == pytest.approx(theta, abs=atol)


@pytest.mark.parametrize("weight", [0.1, 1.0, 4.0])
def test_fixed_reaches_its_point_of_the_front(weight):
    assert_at(descend(Fixed(two(weight)))[0], weight / (1 + weight))


@pytest.mark.parametrize("shape", ["step", "linear", "cosine"])
def test_schedules_end_at_the_point_of_lambda(shape):
    policy = Scheduled(two(3.0), 0.0, shape, 100, 200)
    assert_at(descend(policy)[0], 0.75)
    before = np.asarray([policy.at(i, 3.0) for i in (0, 50, 99)])
    np.testing.assert_array_equal(before, 0)
    assert float(policy.at(200, 3.0)) == float(policy.at(599, 3.0)) == 3
    at = {"step": (3, 3), "linear": (0.75, 1.5), "cosine": (3 * (1 - np.cos(np.pi / 4)) / 2, 1.5)}
    np.testing.assert_allclose([policy.at(125, 3.0), policy.at(150, 3.0)], at[shape], rtol=1e-6)
    assert policy.can_be_zero and not Scheduled(two(3.0), 1.0, shape, 100, 200).can_be_zero


def stationary(weight, floor):
    """θ where the gradients of log L_text + λ log L_action cancel, found by bisection in float64."""
    d2 = float((B - A) @ (B - A))

    def slope(theta):
        text, action = 0.5 * theta**2 * d2 + floor, 0.5 * (1 - theta) ** 2 * d2 + floor
        return theta / text - weight * (1 - theta) / action

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return low


@pytest.mark.parametrize("weight", [1.0, 1.5])
@pytest.mark.parametrize("policy", [lambda w: Uncertainty(two(w), 0.2), lambda w: LossEma(two(w), 0.9)])
def test_losses_that_are_normalised_have_the_stationary_point_of_their_logarithms(policy, weight):
    """At rest both weights are the closed form, 1 / L_text and λ / L_action."""
    floor = 20.0
    x, _, _, weights = descend(policy(weight), steps=4000, floor=floor)
    assert_at(x, stationary(weight, floor), atol=1e-3)
    text, action = values(losses(x, floor))
    np.testing.assert_allclose(weights["text"][-1], 1 / text, rtol=1e-4)
    np.testing.assert_allclose(weights["action"][-1], weight / action, rtol=1e-4)


def test_uncertainty_minimises_its_objective():
    """Its step is the gradient of exp(-s) L + s by automatic differentiation."""
    s, loss = two(-0.4, 0.3), jax.tree.map(jnp.float32, two(0.2, 1.7))
    want = jax.grad(lambda s: sum(jnp.exp(-s[i]) * loss[i] + s[i] for i in s))(s)
    got = Uncertainty(two(2.0), 0.1).update(jax.tree.map(jnp.float32, s), loss, None)
    np.testing.assert_allclose(values(got), [s[i] - 0.1 * want[i] for i in ("text", "action")], rtol=1e-6)


def test_the_running_mean_has_no_bias():
    policy, state, seen = LossEma(two(2.0), 0.9), LossEma(two(2.0), 0.9).init(), [3.0, 1.0, 4.0]
    np.testing.assert_array_equal(values(policy.weights(0, state, None).trunk), [1, 2])
    for loss in seen:
        state = policy.update(state, two(jnp.float32(5), jnp.float32(loss)), None)
    coefficients = 0.9 ** np.arange(2, -1, -1)
    mean = coefficients @ seen / coefficients.sum()
    np.testing.assert_allclose(values(policy.weights(3, state, None).trunk), [1 / mean, 2 / 5], rtol=1e-6)


def test_gradnorm_balances_training_rates():
    """At rest L_text / L_text(0) = L_action / L_action(0), where the two gradients cancel: θ in closed form."""
    x, gradient, state, weights = descend(GradNorm(two(1.0), 0.05, 1.5), steps=3000)
    first = losses(START)
    root = np.sqrt(float(first["text"]) / float(first["action"]))
    assert_at(x, root / (1 + root), atol=1e-3)
    np.testing.assert_allclose(gradient, 0, atol=1e-3)
    np.testing.assert_allclose(weights["text"] + weights["action"], 2, rtol=1e-6)
    np.testing.assert_allclose(values(state["first"]), values(first), rtol=1e-6)


@pytest.mark.parametrize(("weight", "alpha"), [(1.0, 0.0), (2.0, 0.0), (1.0, 1.5), (0.5, 0.5)])
def test_gradnorm_balance(weight, alpha):
    """With gradients and losses that stand still: G_action / G_text = λ (r_action / r_text)^α."""
    policy = GradNorm(two(weight), 0.3, alpha)
    first, later = two(jnp.float32(3.0), jnp.float32(2.0)), two(jnp.float32(0.6), jnp.float32(1.0))
    gram = jnp.array([[16.0, -1.0], [-1.0, 0.25]])
    state = policy.update(policy.init(), first, gram)
    for _ in range(100):
        state = policy.update(state, later, gram)
    w = policy.weights(0, state, gram).trunk
    got = (w["action"] * 0.5) / (w["text"] * 4.0)
    np.testing.assert_allclose(got, weight * ((0.6 / 3.0) / (1.0 / 2.0)) ** alpha, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
def test_gradient_ratio_holds_in_every_step(weight):
    policy = GradientRatio(two(weight))
    gradients, _ = per_loss(lambda p: (losses(p["x"]), None), {"x": jnp.asarray(START)})
    w = policy.weights(0, policy.init(), gram_of(gradients, {"x": True})).trunk
    norms = [np.linalg.norm(g["x"]) for g in values(gradients)]
    assert w["text"] == 1
    np.testing.assert_allclose(w["action"] * norms[1], weight * norms[0], rtol=1e-6)


def test_gradient_ratio_rests_where_the_stronger_loss_does():
    """On the front the gradients point against each other: the ratio decides, and at 1 every point is at rest."""
    assert_at(descend(GradientRatio(two(0.5)), steps=1500)[0], 0)
    x, gradient, _, _ = descend(GradientRatio(two(1.0)), steps=1500)
    theta, distance = front(x)
    assert 0 < theta < 1 and distance < 1e-3
    np.testing.assert_allclose(gradient, 0, atol=1e-3)


vectors = st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4).map(np.float64)
weights_ = st.floats(0.05, 20)


def applied(policy, text, action):
    both = np.stack([text, action])
    w = policy.weights(0, policy.init(), jnp.float32(both @ both.T)).trunk
    return float(w["text"]) * text + float(w["action"]) * action


@settings(max_examples=60, deadline=None)
@given(vectors, vectors, weights_)
def test_pcgrad_is_the_projection(text, action, weight):
    """Algorithm 1 of the paper, written out for vectors."""
    if min(np.linalg.norm(text), np.linalg.norm(action)) < 1e-2:
        return
    weighted = weight * action
    want = text + weighted
    if text @ weighted < 0:
        onto = (
            text - (text @ weighted) / (weighted @ weighted) * weighted,
            weighted - (weighted @ text) / (text @ text) * text,
        )
        assert abs(onto[0] @ weighted) < 1e-6 * (1 + weighted @ weighted)
        want = sum(onto)
    scale = np.linalg.norm(text) + np.linalg.norm(weighted)
    conflict = max(-(text @ weighted), 0) / min(text @ text, weighted @ weighted)
    np.testing.assert_allclose(
        applied(PCGrad(two(weight)), text, action), want, atol=1e-5 * scale * (1 + conflict)
    )


@settings(max_examples=60, deadline=None)
@given(vectors, vectors, weights_)
def test_mgda_is_the_shortest_combination(text, action, weight):
    """No convex combination is shorter, and it descends on both losses unless it is zero."""
    weighted = weight * action
    got = applied(MGDA(two(weight)), text, action) / 2
    size = max(text @ text, weighted @ weighted, 1e-6)
    shares = np.linspace(0, 1, 101)[:, None]
    shortest = ((shares * text + (1 - shares) * weighted) ** 2).sum(1).min()
    assert got @ got <= shortest + 1e-5 * size
    assert min(
        got @ text / max(np.sqrt(text @ text), 1e-6), got @ weighted / np.sqrt(size)
    ) >= -1e-3 * np.sqrt(size)


@settings(max_examples=60, deadline=None)
@given(vectors, vectors, weights_, st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_cagrad_is_the_best_for_the_worse_off_within_its_ball(text, action, weight, radius):
    """No direction of a fine grid over the ball's part of the two gradients' plane makes the smaller descent larger."""
    weighted = weight * action
    got = applied(CAGrad(two(weight), radius), text, action) / 2
    mean = (text + weighted) / 2
    length = np.linalg.norm(mean)
    size = max(text @ text, weighted @ weighted, 1e-6)
    assert np.linalg.norm(got - mean) <= radius * length + 1e-4 * np.sqrt(size)
    basis = np.linalg.svd(np.stack([text, weighted]), full_matrices=False)[2]
    angles = np.linspace(0, 2 * np.pi, 721)[:, None]
    others = mean + radius * length * (np.cos(angles) * basis[0] + np.sin(angles) * basis[1])
    best = np.minimum(others @ text, others @ weighted).max()
    assert min(got @ text, got @ weighted) >= best - 2e-3 * size


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_cagrad_rests_where_the_plain_sum_does(weight):
    assert_at(descend(CAGrad(two(weight), 0.5), steps=1500)[0], weight / (1 + weight), atol=1e-3)
    text, action = np.array([1.0, 2.0]), np.array([-3.0, 0.5])
    np.testing.assert_allclose(
        applied(CAGrad(two(weight), 0.0), text, action), text + weight * action, rtol=1e-6
    )


@pytest.mark.parametrize("policy", [PCGrad(two(1.0)), PCGrad(two(3.0)), MGDA(two(1.0)), MGDA(two(3.0))])
def test_surgery_rests_on_the_front_and_only_there(policy):
    x, gradient, _, _ = descend(policy, steps=2000)
    theta, distance = front(x)
    assert 0 < theta < 1 and distance < 1e-2
    np.testing.assert_allclose(gradient, 0, atol=1e-2)
    on_front = A + 0.3 * (B - A)
    assert_at(descend(policy, steps=50, start=on_front)[0], 0.3, atol=1e-3)


def test_outside_the_trunk_each_loss_has_its_own_gradient():
    """Surgery on the trunk; λ g_action on the expert, whatever the conflict."""
    between = A + 0.4 * (B - A) + 0.1  # a conflict, but not yet the front
    params = {"backbone": jnp.asarray(between), "expert": jnp.float32(2.0)}

    def both(p):
        found = losses(p["backbone"])
        return two(found["action"] * p["expert"] ** 2, found["text"]), None

    gradients, _ = per_loss(both, params)
    inside = trunk.inside(params, ("backbone",), "trunk")
    for policy in (PCGrad(two(3.0)), MGDA(two(3.0)), CAGrad(two(3.0), 0.5)):
        weights = policy.weights(0, None, gram_of(gradients, inside))
        got = combine(weights, gradients, inside)
        np.testing.assert_allclose(got["expert"], 3 * gradients["action"]["expert"], rtol=1e-6)
        assert (
            np.abs(
                got["backbone"] - gradients["text"]["backbone"] - 3 * gradients["action"]["backbone"]
            ).max()
            > 0.1
        )


def test_a_loss_that_is_not_in_the_batch_teaches_nothing():
    absent, none = two(jnp.float32(0), jnp.float32(0)), jnp.zeros((2, 2))
    for policy in (
        Uncertainty(two(1.0), 0.1),
        LossEma(two(1.0), 0.9),
        GradNorm(two(1.0), 0.1, 1.5),
        GradientRatio(two(2.0)),
    ):
        state = policy.init()
        jax.tree.map(np.testing.assert_array_equal, policy.update(state, absent, none), state)
        assert np.isfinite(values(policy.weights(0, state, none).trunk)).all()
    for policy in (PCGrad(two(2.0)), MGDA(two(2.0)), CAGrad(two(2.0), 0.5)):
        assert np.isfinite(values(policy.weights(0, None, none).trunk)).all()


def test_every_policy_is_built_and_its_state_is_scalars():
    for name in OPTIONS:
        policy = make_weighting(WeightingConfig(policy=name), two(2.0), 1000)
        assert all(x.shape == () and x.dtype == jnp.float32 for x in jax.tree.leaves(policy.init()))
        assert policy.uses_gradients == ("trunk" in OPTIONS[name])
    assert make_weighting(WeightingConfig(policy="cosine", begin=0.1, end=0.3), two(2.0), 1000).end == 300


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "gradnrom"}, "use one of fixed, step"),
        ({"policy": "uncertainty", "decay": 0.5}, "decay means nothing to policy uncertainty; .* loss_ema"),
        ({"policy": "step", "start": -1.0}, "start=-1.0 is negative"),
        ({"policy": "linear", "begin": 0.5, "end": 0.5}, "not after begin"),
        ({"policy": "cosine", "end": 1.5}, "shares of the run"),
        ({"policy": "gradnorm", "rate": 0.0}, "rate=0.0: must be above 0"),
        ({"policy": "gradnorm", "asymmetry": -1.0}, "asymmetry"),
        ({"policy": "loss_ema", "decay": 1.0}, "decay=1.0"),
        ({"policy": "pcgrad", "trunk": ()}, "names no path"),
        ({"policy": "cagrad", "radius": 1.0}, "radius=1.0"),
    ],
)
def test_impossible_policies(values, message):
    with pytest.raises(ValueError, match=message):
        WeightingConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"action_weight": -0.5}, "action_weight=-0.5 is negative"),
        ({"action_weight": 0.0, "weighting": WeightingConfig(policy="mgda")}, "action_weight=0 leaves one"),
        ({"text": False, "weighting": WeightingConfig(policy="gradnorm")}, "text=False leaves one"),
        (
            {"text": False, "diagnostics": DiagnosticsConfig(every=10)},
            "diagnostics.every=10 needs two losses",
        ),
        (
            {"insulation": 0.0, "weighting": WeightingConfig(policy="pcgrad")},
            "keeps the action loss's from it",
        ),
    ],
)
def test_impossible_objectives(values, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(ObjectiveConfig(), **values)
    assert "\n" not in str(error.value)


def test_a_path_without_parameters_is_refused_with_the_nearest():
    params = {"backbone": {"llm": {"layers": {"w": 0.0}}, "llm2": {"w": 0.0}}, "expert": {"w": 0.0}}
    with pytest.raises(
        ValueError, match=r"where: no parameter lies under 'backbone/lm'; did you mean 'backbone/llm'"
    ):
        trunk.inside(params, ("backbone/lm",), "where")
    found = trunk.inside(params, ("backbone/llm/", "expert/w"), "where")
    assert found == {
        "backbone": {"llm": {"layers": {"w": True}}, "llm2": {"w": False}},
        "expert": {"w": True},
    }
