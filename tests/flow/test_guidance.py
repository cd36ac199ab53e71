"""Guidance: equalities, costs, closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.flow.conftest import normal, normals
from vla_jax.flow.base import solve
from vla_jax.flow.config import SolverConfig
from vla_jax.flow.guidance import (
    autoguidance,
    classifier,
    classifier_free,
    clean_prefix,
    drop_condition,
    inpaint,
    mix,
    soft_inpaint,
    soft_weights,
)
from vla_jax.flow.oracle import GaussianMixture
from vla_jax.flow.predictions import convert
from vla_jax.flow.schedules import VP, CondOT


def toy(x, t, c):
    """A nonlinear field of x [b a], t [b] and a condition [b a]."""
    return jnp.tanh(x + c) * (1 + t[:, None])


@pytest.fixture
def case():
    x, c = normals(0, 2, (4, 3))
    return x, jnp.linspace(0.1, 0.9, 4), c, jnp.zeros(3)


def test_scales_zero_and_one_are_one_evaluation(case):
    """w = 1 and w = 0 are the plain calls bit for bit; others are one batch twice as long."""
    x, t, c, null = case
    sizes = []

    def counted(x, t, c):
        sizes.append(x.shape[0])
        return toy(x, t, c)

    for w, condition in ((1, c), (1.0, c), (0, null), (0.0, null)):
        np.testing.assert_array_equal(classifier_free(counted, c, null, w)(x, t), toy(x, t, condition))
    guided = classifier_free(counted, c, null, 2.5)(x, t)
    assert sizes == [4, 4, 4, 4, 8]
    expected = toy(x, t, null) + 2.5 * (toy(x, t, c) - toy(x, t, null))
    np.testing.assert_allclose(guided, expected, rtol=1e-12)
    per_sample = classifier_free(toy, c, null, jnp.array([0.0, 1.0, 2.5, 2.5]))(x, t)
    np.testing.assert_allclose(per_sample[1], toy(x, t, c)[1], rtol=1e-12)
    np.testing.assert_allclose(per_sample[2:], expected[2:], rtol=1e-12)


def test_traced_scale_compiles_once(case):
    """Test-time control without compiling again; and it is differentiable."""
    x, t, c, null = case
    guided = jax.jit(lambda w: classifier_free(toy, c, null, w)(x, t))
    for w in (0.0, 1.0, 1.5, 7.0):
        np.testing.assert_allclose(
            guided(w), toy(x, t, null) + w * (toy(x, t, c) - toy(x, t, null)), rtol=1e-9
        )
    assert guided._cache_size() == 1
    slope = jax.jacfwd(guided)(2.0)
    np.testing.assert_allclose(slope, toy(x, t, c) - toy(x, t, null), rtol=1e-9)


def test_interval_and_zero_star(case):
    x, t, c, null = case
    f_c, f_u = toy(x, t, c), toy(x, t, null)
    made = classifier_free(toy, c, null, 3.0, interval=(0.3, 0.7))(x, t)
    inside = ((t >= 0.3) & (t <= 0.7))[:, None]
    np.testing.assert_allclose(made, jnp.where(inside, f_u + 3 * (f_c - f_u), f_c), rtol=1e-12)
    calls = []
    counted = lambda x, t, c: jax.debug.callback(lambda: calls.append(x.shape[0])) or toy(x, t, c)  # noqa: E731
    classifier_free(counted, c, null, 3.0, interval=(0.3, 0.7))(x, jnp.full(4, 0.9))
    jax.effects_barrier()
    assert calls == [4]
    s = (f_c * f_u).sum(1, keepdims=True) / (f_u**2).sum(1, keepdims=True)
    made = classifier_free(toy, c, null, 3.0, zero_star=True)(x, t)
    np.testing.assert_allclose(made, s * f_u + 3 * (f_c - s * f_u), rtol=1e-9)
    nothing = classifier_free(lambda x, t, c: c * x, jnp.ones(4)[:, None], jnp.zeros(1), 2.0, zero_star=True)(
        x, t
    )
    np.testing.assert_allclose(nothing, 2 * x, rtol=1e-12)


def test_guided_gaussian_has_the_closed_form():
    """Its deviation is s_u^(1-w) s_c^w on CondOT, which is *not* the tilted law p^(1-w) p_c^w."""
    prior, conditional = (
        GaussianMixture(weights=jnp.ones(1), means=jnp.zeros((1, 1)), stds=jnp.full((1, 1), s))
        for s in (1.0, 0.5)
    )
    x = jnp.array([[1.0], [-2.0]])

    def field(x, t, c):
        return jnp.where(c > 0, conditional.velocity(x, t), prior.velocity(x, t))

    c, null = jnp.ones((2, 1)), jnp.zeros((1, 1))
    end = jax.jit(
        lambda w: solve(classifier_free(field, c, null, w), x, SolverConfig(method="rk4", num_steps=100)).x
    )
    for w, std in ((1.5, 0.354), (2.0, 0.25), (3.0, 0.125), (5.0, 0.031)):
        np.testing.assert_allclose(end(w) / x, 0.5**w, rtol=2e-3)
        np.testing.assert_allclose(0.5**w, std, atol=5e-4)
        tilted = (w / 0.25 + 1 - w) ** -0.5
        assert tilted > 1.05 * 0.5**w


def test_guiding_any_prediction_is_guiding_all(mixture):
    g, h = (
        mixture(VP()),
        GaussianMixture(weights=jnp.ones(1), means=jnp.zeros((1, 2)), stds=jnp.ones((1, 2)), schedule=VP()),
    )
    x, t = normal(0, (4, 2)), jnp.linspace(0.1, 0.9, 4)

    @jax.jit
    def run(x, t):
        kinds = ("velocity", "eps", "x1", "score")
        guided = {k: autoguidance(getattr(g, k), getattr(h, k), 2.0)(x, t) for k in kinds}
        expected = h.velocity(x, t) + 2 * (g.velocity(x, t) - h.velocity(x, t))
        return expected, {k: convert(VP(), k, "velocity", v, x, t) for k, v in guided.items()}

    expected, made = run(x, t)
    for kind, velocity in made.items():
        np.testing.assert_allclose(velocity, expected, rtol=1e-9, atol=1e-9, err_msg=kind)
    assert autoguidance(g.velocity, h.velocity, 1) == g.velocity


def test_perfect_classifier_gives_the_conditional_field(mixture):
    """score + grad log p(c|x) is the score of the component, for each kind of prediction and path."""
    for schedule in (CondOT(), VP()):
        g = mixture(schedule)
        one = GaussianMixture(weights=jnp.ones(1), means=g.means[1:2], stds=g.stds[1:2], schedule=schedule)
        x, t = normal(0, (3, 2)), jnp.array([0.1, 0.5, 0.9])

        @jax.jit
        def fields(x, t, g=g, schedule=schedule):
            log_prob = lambda x, t: g.log_posterior(x, t)[:, 1]  # noqa: E731
            kinds = ("velocity", "eps", "x1", "score")
            made = {
                k: classifier(getattr(g, k), log_prob, 1.0, schedule=schedule, prediction=k) for k in kinds
            }
            v = lambda x, t: convert(schedule, "velocity", "v", g.velocity(x, t), x, t)  # noqa: E731
            made["v"] = classifier(v, log_prob, 1.0, schedule=schedule, prediction="v")
            return {k: f(x, t) for k, f in made.items()}

        for kind, made in fields(x, t).items():
            expected = convert(schedule, "velocity", kind, one.velocity(x, t), x, t)
            np.testing.assert_allclose(made, expected, rtol=1e-7, atol=1e-8, err_msg=kind)
        ends = fields(x, jnp.array([0.0, 0.0, 1.0]))
        assert all(jnp.isfinite(value).all() for value in ends.values())


def test_more_classifier_more_class(mixture):
    """The share of samples in the class rises with w, their spread falls."""
    g = mixture(CondOT())
    x = normal(0, (500, 2))

    @jax.jit
    def sample(w):
        log_prob = lambda x, t: g.log_posterior(x, t)[:, 2]  # noqa: E731
        return solve(classifier(g.velocity, log_prob, w, schedule=CondOT()), x, SolverConfig(num_steps=40)).x

    runs = [sample(w) for w in (0.0, 1.0, 2.0, 4.0)]
    share = [float(jnp.exp(g.log_posterior(y, jnp.asarray(1.0))[:, 2]).mean()) for y in runs]
    spread = [float(jnp.linalg.slogdet(jnp.cov(y.T))[1]) for y in runs]
    assert abs(share[0] - 0.2) < 0.05 and (np.diff(share) > 0).all() and (np.diff(spread) < 0).all()


def test_conditions_are_dropped_sample_by_sample():
    """10 % of samples, all of a sample's entries together, whatever the pytree."""
    condition = {"a": jnp.ones((100_000, 2, 3)), "b": jnp.ones(100_000, jnp.int32)}
    null = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((), jnp.int32)}
    dropped = drop_condition(jax.random.key(0), condition, null, 0.1)
    share = 1 - dropped["b"].mean()
    assert abs(share - 0.1) < 0.005 and dropped["b"].dtype == jnp.int32
    np.testing.assert_array_equal(
        dropped["a"], jnp.broadcast_to(dropped["b"][:, None, None], (100_000, 2, 3))
    )


def test_inpainting(mixture):
    """Known entries end where they must, the others follow the law given them."""
    independent = GaussianMixture(
        weights=jnp.ones(1), means=jnp.array([[1.0, -1.0]]), stds=jnp.array([[0.5, 0.2]])
    )
    noise = normal(0, (6, 2))
    known, mask = jnp.full((6, 2), 3.0), jnp.array([[True, False]] * 6)
    for method in ("euler", "rk4"):
        solver = SolverConfig(method=method, num_steps=10)
        made = solve(inpaint(independent.velocity, known, mask, noise, CondOT()), noise, solver).x
        free = solve(independent.velocity, noise, solver).x
        np.testing.assert_allclose(made[:, 0], 3, rtol=1e-12)
        np.testing.assert_allclose(made[:, 1], free[:, 1], rtol=1e-12)


def test_soft_inpainting_on_a_linear_field():
    """Against the formula with the Jacobian written out; free at weight 0; finite at both ends."""
    m = normal(0, (3, 3))
    x, known, weight = normals(1, 3, (4, 3))
    weight = jnp.abs(weight)
    t = jnp.array([0.0, 0.3, 0.6, 1.0])
    field = lambda x, t: x @ m.T  # noqa: E731
    made = soft_inpaint(field, known, weight, bound=5.0)(x, t)
    for i in range(4):
        s = float(t[i])
        jacobian = np.eye(3) + (1 - s) * np.asarray(m)
        r2 = (1 - s) ** 2 / (s**2 + (1 - s) ** 2)
        strength = 5.0 if s in (0, 1) else min(5.0, (1 - s) / (s * r2))
        pulled = jacobian.T @ (weight[i] * (known[i] - jacobian @ x[i]))
        np.testing.assert_allclose(made[i], m @ x[i] + strength * pulled, rtol=1e-9)
    np.testing.assert_allclose(soft_inpaint(field, known, 0 * weight)(x, t), x @ m.T, rtol=1e-12)


def test_mixing_is_exact_at_both_ends():
    """w = 0 and w = 1 with a traced w: not to rounding but bit for bit, in float32 too."""
    f_c, f_u = (u.astype(jnp.float32) for u in normals(5, 2, (1000, 3)))
    mixed = jax.jit(mix)
    np.testing.assert_array_equal(mixed(f_c, f_u, 1.0), f_c)
    np.testing.assert_array_equal(mixed(f_c, f_u, 0.0), f_u)
    np.testing.assert_allclose(mixed(f_c, f_u, 3.0), f_u + 3 * (f_c - f_u), rtol=1e-4, atol=1e-5)


def test_soft_inpainting_without_the_jacobian_is_another_rule():
    """The Jacobian-free form pulls by the error itself; the true form is different wherever the field is not flat."""
    x, known, weight = normals(2, 3, (4, 3))
    weight, t = jnp.abs(weight), jnp.array([0.1, 0.3, 0.6, 0.9])
    field = lambda x, t: jnp.tanh(x) * (1 + t[:, None])  # noqa: E731
    made = soft_inpaint(field, known, weight, jacobian=False)(x, t)
    s = np.asarray(t)[:, None]
    v = np.asarray(field(x, t))
    strength = np.minimum(5.0, (1 - s) / s * (s**2 + (1 - s) ** 2) / (1 - s) ** 2)
    expected = v + strength * np.asarray(weight) * (np.asarray(known) - (np.asarray(x) + (1 - s) * v))
    np.testing.assert_allclose(made, expected, rtol=1e-9)
    assert np.abs(made - soft_inpaint(field, known, weight)(x, t)).max() > 0.1


@pytest.mark.parametrize(("horizon", "delay", "execute"), [(16, 4, 4), (8, 0, 2), (8, 3, 5), (50, 7, 25)])
def test_soft_weights_are_the_papers(horizon, delay, execute):
    """Written out step by step as in the paper's equation 5, and traced: delays compile once."""
    end, expected = horizon - execute, []
    for i in range(horizon):
        c = min(max((delay - 1 - i) / (end - delay + 1) + 1, 0), 1)
        expected.append(0 if i >= end else c * np.expm1(c) / np.expm1(1))
    np.testing.assert_allclose(
        jax.jit(soft_weights, static_argnums=0)(horizon, delay, end), expected, atol=1e-6
    )


def test_a_clean_prefix_is_kept_and_shown_as_data():
    x, known = normals(3, 2, (2, 5, 3))
    held = jnp.arange(5)[None, :, None] < jnp.array([2, 0])[:, None, None]
    seen = []

    def field(x, t):
        seen.append((x, t))
        return jnp.ones_like(x)

    v = clean_prefix(field, known, held)(x, jnp.array([0.25, 0.5]))
    shown, times = seen[0]
    np.testing.assert_array_equal(v[0, :2], 0)
    assert (v[0, 2:] == 1).all() and (v[1] == 1).all()
    np.testing.assert_array_equal(shown[0, :2], known[0, :2])
    np.testing.assert_array_equal(shown[0, 2:], x[0, 2:])
    np.testing.assert_array_equal(times, [[1, 1, 0.25, 0.25, 0.25], [0.5] * 5])
    end = solve(clean_prefix(field, known, held), jnp.where(held, known, x), SolverConfig(num_steps=3)).x
    np.testing.assert_array_equal(end[0, :2], known[0, :2])
    np.testing.assert_allclose(end[1], x[1] + 1, rtol=1e-12)
